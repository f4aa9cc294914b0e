"""`dinov2 index` on many small files: files a second, memory, a second run; beside the machine's own read-and-decompress rate.

    python benchmarks/index.py [--files 20000] [--shape 32 32 24] [--workers N] [--folder DIR]

The files are generated NIfTI (gzip) of 16-bit voxels, smooth structure with noise on a background of zeros, all
different. The reference reads and decompresses the same files with zlib, in as many processes, and does nothing with them.
Memory is the largest of the main process, at a tenth of the files and at all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nibabel as nib
import numpy as np

from dinov2.data.pool import default_workers, unordered

FILES_PER_FOLDER = 500
BATCH = 10
_CHILD = """
import json, resource, sys, time
from pathlib import Path
from dinov2.data.corpus.index.command import IndexRequest, index
start = time.perf_counter()
index([Path(sys.argv[1])], IndexRequest(Path(sys.argv[2]), num_workers=int(sys.argv[3])), lambda line: None)
status = Path("/proc/self/status").read_text()  # getrusage counts the process that started this one too
memory = int(status.split("VmHWM:")[1].split()[0]) / 1024
workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps([time.perf_counter() - start, memory, workers, len(json.loads(Path(sys.argv[2]).read_text()))]))
"""


def generate(folder: Path, first: int, last: int, shape: list[int]) -> None:
    """Files number `first` up to `last`, as the module's head describes."""
    axes = np.meshgrid(*[np.linspace(-1.1, 1.1, n) for n in shape], indexing="ij")
    inside = sum(a**2 for a in axes) < 1
    for number in range(first, last):
        rng = np.random.default_rng(number)
        wave = sum(np.sin(rng.uniform(2, 6) * a + rng.uniform(0, 6)) for a in axes)
        voxels = np.where(inside, 500 + 100 * wave + rng.normal(0, 15, shape), 0).astype(np.int16)
        place = folder / f"{number // FILES_PER_FOLDER:03d}"
        place.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), place / f"{number:06d}.nii.gz")


def read_and_decompress(paths: list[str]) -> int:
    return sum(len(zlib.decompress(Path(p).read_bytes(), wbits=31)) for p in paths)


def reference_s(folder: Path, num_workers: int) -> float:
    """Seconds to read and decompress all files, the start of the processes left out."""
    paths = [str(p) for p in sorted(folder.rglob("*.nii.gz"))]
    batches = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
    results = unordered(read_and_decompress, batches, num_workers)
    next(results)  # the processes are there
    start = time.perf_counter()
    for _ in results:
        pass
    return (time.perf_counter() - start) * len(batches) / (len(batches) - 1)


def run_index(folder: Path, output: Path, num_workers: int) -> tuple[float, float, float, int]:
    """Seconds, MiB of the main process, MiB of the largest other one, volumes listed."""
    command = [sys.executable, "-c", _CHILD, str(folder), str(output), str(num_workers)]
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": root})
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--shape", type=int, nargs=3, default=[32, 32, 24], help="voxels of each")
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--folder", type=Path, help="where to put the files; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder, tenth = Path(temporary, "data"), args.files // 10
        folder.mkdir()
        generate(folder, 0, tenth, args.shape)
        _, small_mib, _, _ = run_index(folder, Path(temporary, "tenth.json"), args.workers)
        generate(folder, tenth, args.files, args.shape)
        raw_s = reference_s(folder, args.workers)
        first_s, all_mib, worker_mib, listed = run_index(folder, Path(temporary, "list.json"), args.workers)
        second_s, *_ = run_index(folder, Path(temporary, "list.json"), args.workers)
    print(f"{args.files} files of {'x'.join(map(str, args.shape))}, {args.workers} processes; {listed} listed")
    print(f"read and decompress alone   {args.files / raw_s:8.0f} files/s")
    print(f"index, first run            {args.files / first_s:8.0f} files/s   {raw_s / first_s:.0%} of it, starts included")
    print(f"index, second run           {args.files / second_s:8.0f} files/s   {second_s:.1f} s")
    print(f"memory, main process        {small_mib:.0f} MiB at {tenth} files, {all_mib:.0f} MiB at {args.files}")
    print(f"memory, largest worker      {worker_mib:.0f} MiB")


if __name__ == "__main__":
    main()
