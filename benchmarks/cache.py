"""A cached volume to ten crops, against loading a float32 tensor and cropping it with MONAI; sizes; forms of storage.

    python benchmarks/cache.py [--shape H W D] [--rounds N] [--datalist LIST] [--forms]

The volume is generated: smooth structure of 32 voxels' grain and Gaussian noise of 1 % of the range, rounded to 2,000 grey
levels as a 12-bit scanner gives them, on a background of zeros around an ellipsoid. One core, files in the page cache
(warm). `--datalist` also caches real volumes and compares bytes. `--forms` times whole and box reads of ways to store the
voxels, what docs/decisions/003-cache-format.md was decided by.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nibabel as nib
import numpy as np
import torch

from dinov2.data import DataAugmentationDINO3d, read_datalist
from dinov2.data.cache.folder import VolumeCache
from dinov2.data.cache.store import load_volume
from dinov2.data.datalist import Datalist, Entry
from dinov2.data.workers import keep_freed_memory
from dinov2.errors import BadVolume

NUM_PLANS = 8


def generated(shape: tuple[int, int, int]) -> np.ndarray:
    """[H, W, D] int16, as the module's head describes."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.standard_normal([n // 32 + 2 for n in shape]).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse[None, None], size=shape, mode="trilinear")[0, 0].numpy()
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    noisy = np.clip(smooth + 0.01 * rng.standard_normal(shape, dtype=np.float32), 0, 1)
    axes = [np.linspace(-1.05, 1.05, n, dtype=np.float32) for n in shape]
    inside = axes[0][:, None, None] ** 2 + axes[1][:, None] ** 2 + axes[2] ** 2 < 1
    return np.where(inside, 1 + np.round(1999 * noisy), 0).astype(np.int16)


def alternate(ways: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Mean over plans of each way's best time, in milliseconds; the ways take turns."""
    total = dict.fromkeys(ways, 0.0)
    for plan in range(NUM_PLANS):
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(rounds):
            for name, work in ways.items():
                start = time.perf_counter()
                work(plan)
                best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
        for name, value in best.items():
            total[name] += value / NUM_PLANS
    return total


def read_and_crop(shape: tuple[int, int, int], rounds: int, folder: Path) -> None:
    nib.save(nib.Nifti1Image(generated(shape), np.eye(4)), folder / "volume.nii")
    entry = Entry(str(folder / "volume.nii"), shape)
    cache = VolumeCache(folder / "cache")
    volume = load_volume(entry, 0, cache)
    torch.save(volume.data, folder / "volume.pt")
    fast, monai = DataAugmentationDINO3d(backend="fast"), DataAugmentationDINO3d(backend="monai")
    checked = cache  # this process has verified the file: what every draw but the first costs
    checked.load(entry, 0)
    ways = {
        "torch.load of float32 + MONAI": lambda seed: monai(torch.load(folder / "volume.pt", mmap=False), seed),
        "cache + fast": lambda seed: fast(checked.load(entry, 0).voxels, seed),
        "cache, first read (checksum) + fast": lambda seed: fast(VolumeCache(folder / "cache").load(entry, 0).voxels, seed),
        "  torch.load alone": lambda _: torch.load(folder / "volume.pt", mmap=False),
        "  cached read alone": lambda _: checked.load(entry, 0),
    }
    times = alternate(ways, rounds)
    reference = times["torch.load of float32 + MONAI"]
    print(f"generated {tuple(volume.voxels.shape[1:])} after cropping, one core, warm")
    for name, value in times.items():
        print(f"  {name:38} {value:8.1f} ms {reference / value:6.2f} x")
    (item,) = cache.items()
    size = item.stat().st_size
    print(f"  {size / 2**20:.1f} MiB cached: {size / volume.data.nbytes:.0%} of float32")


def real_sizes(datalist: Datalist, folder: Path) -> None:
    cache = VolumeCache(folder / "real")
    as_float = 0
    for entry in datalist.entries:
        try:
            as_float += load_volume(entry, 0, cache).data.nbytes
        except BadVolume as err:
            print(f"  left out: {err}")
    size = sum(p.stat().st_size for p in cache.items())
    print(f"{datalist.path}: {len(datalist)} volumes, {size / 2**20:.1f} MiB cached: {size / as_float:.0%} of float32")


def forms(shape: tuple[int, int, int], folder: Path, rounds: int) -> None:
    """Whole reads, and reads of a cube of 96 voxels, from files in the page cache."""
    import blosc2

    nib.save(nib.Nifti1Image(generated(shape), np.eye(4)), folder / "forms.nii")
    voxels = load_volume(Entry(str(folder / "forms.nii"), shape), 0).voxels[0].numpy()
    box = tuple(slice(n // 4, n // 4 + 96) for n in voxels.shape)
    np.save(folder / "raw.npy", voxels)
    files: dict[str, tuple[Path, Callable[[Path], np.ndarray]]] = {
        "memory map": (folder / "raw.npy", lambda p: np.load(p, mmap_mode="r"))
    }
    chunks = {"slabs of 8": (8, *voxels.shape[1:]), "cubes of 64": (64, 64, 64)}
    filters = {"shuffle": blosc2.Filter.SHUFFLE, "bitshuffle": blosc2.Filter.BITSHUFFLE}
    for codec in ("LZ4", "ZSTD"):
        for filter_name, filter_ in filters.items():
            for chunk_name, chunk in chunks.items():
                path = folder / f"{codec}{filter_name}{chunk_name}.b2nd".replace(" ", "")
                how = {"codec": blosc2.Codec[codec], "clevel": 5 if codec == "LZ4" else 1, "filters": [filter_], "nthreads": 1}
                blosc2.asarray(voxels, chunks=chunk, urlpath=str(path), mode="w", cparams=how)
                opener = lambda p: blosc2.open(str(p), mode="r", mmap_mode="r", dparams={"nthreads": 1})  # noqa: E731
                files[f"{codec}, {filter_name}, {chunk_name}"] = (path, opener)
    for name, (path, opener) in files.items():
        whole = alternate({"": lambda _, p=path, o=opener: np.array(o(p)[:])}, rounds)[""]
        part = alternate({"": lambda _, p=path, o=opener: np.array(o(p)[box])}, rounds)[""]
        share = os.path.getsize(path) / (2 * voxels.nbytes)
        print(f"  {name:32} {share:5.0%} of float32   whole {whole:7.1f} ms   cube of 96 {part:6.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--datalist", type=Path)
    parser.add_argument("--forms", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as in a loader process
    with tempfile.TemporaryDirectory() as folder:
        read_and_crop(tuple(args.shape), args.rounds, Path(folder))
        if args.datalist:
            real_sizes(read_datalist(args.datalist), Path(folder))
        if args.forms:
            forms(tuple(args.shape), Path(folder), args.rounds)


if __name__ == "__main__":
    main()
