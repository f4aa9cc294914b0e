"""`dinov2 embed` on many scans: scans a second, memory, the network's share of the time; beside loading alone.

    python benchmarks/embed.py [--scans 2000] [--shape 48 48 40] [--weights W] [--mode resize] [--size 48] [--workers N]

The scans are generated NIfTI (gzip) as of `benchmarks/index.py`, in a list with their hashes, so that loading is one read. The
reference loads and prepares the same scans in as many processes, and does nothing with them. Memory is the largest of the main
process, at a tenth of the scans and at all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, ROOT)

from benchmarks.index import generate
from dinov2.data.datalist import Entry, write_datalist
from dinov2.data.pool import default_workers, unordered
from dinov2.features.scans import load_scan

_CHILD = """
import json, sys, time
from pathlib import Path
import dinov2.features.encoder
from dinov2.features.embed import EmbedRequest, embed
from dinov2.features.views import View
list_path, output, weights, mode, size, workers = sys.argv[1:]
encoder = dinov2.features.encoder.load_encoder(weights)
in_network, encode = 0.0, encoder.encode_scan
def timed(scan, view):
    global in_network
    start = time.perf_counter()
    found = encode(scan, view)
    found.cls.cpu()
    in_network += time.perf_counter() - start
    return found
encoder.encode_scan = timed
start = time.perf_counter()
embed(Path(list_path), encoder, EmbedRequest(Path(output), View(mode, int(size)), num_workers=int(workers)), lambda line: None)
taken = time.perf_counter() - start
memory = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps([taken, in_network, memory, str(encoder.device)]))
"""


def write_list(paths: list[Path], shape: list[int], output: Path) -> None:
    write_datalist(output, [{"image": str(p), "shape": shape, "spacing": [1, 1, 1], "sha": p.stem} for p in paths])


def run_embed(list_path: Path, args: argparse.Namespace) -> tuple[float, float, float, str]:
    """Seconds, of these in the network, MiB of the main process, device."""
    words = [str(list_path), str(list_path.with_suffix(".parquet")), args.weights, args.mode, str(args.size), str(args.workers)]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", _CHILD, *words], capture_output=True, text=True, check=True, env=environment)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def load_only(path: str) -> None:
    load_scan([Entry(path, ())])


def reference_s(paths: list[Path], num_workers: int) -> float:
    """Seconds to load and prepare all scans, the start of the processes left out."""
    results = unordered(load_only, [str(p) for p in paths], num_workers)
    next(results)  # the processes are there
    start = time.perf_counter()
    for _ in results:
        pass
    return (time.perf_counter() - start) * len(paths) / (len(paths) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=2000)
    parser.add_argument("--shape", type=int, nargs=3, default=[48, 48, 40], help="voxels of each")
    parser.add_argument("--weights", default="vit_tiny_3d", help="as of `dinov2 embed`")
    parser.add_argument("--mode", default="resize")
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--workers", type=int, default=default_workers())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "data")
        folder.mkdir()
        generate(folder, 0, args.scans, args.shape)
        paths = sorted(folder.rglob("*.nii.gz"))
        write_list(paths[: args.scans // 10], args.shape, Path(temporary, "tenth.json"))
        write_list(paths, args.shape, Path(temporary, "all.json"))
        load_s = reference_s(paths, args.workers)
        _, _, tenth_mib, _ = run_embed(Path(temporary, "tenth.json"), args)
        all_s, network_s, all_mib, device = run_embed(Path(temporary, "all.json"), args)
    shape = "x".join(map(str, args.shape))
    print(f"{args.scans} scans of {shape}, {args.weights}, {args.mode} {args.size}, {device}, {args.workers} processes")
    print(f"load and prepare alone      {args.scans / load_s:8.1f} scans/s")
    print(f"embed                       {args.scans / all_s:8.1f} scans/s   {network_s / all_s:.0%} of the time in the network")
    print(f"memory, main process        {tenth_mib:.0f} MiB at {args.scans // 10} scans, {all_mib:.0f} MiB at {args.scans}")


if __name__ == "__main__":
    main()
