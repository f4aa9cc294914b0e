"""What an NVIDIA GPU does with every part of this project, as a Markdown table for docs/gpu.md, in a few minutes.

    python benchmarks/gpu.py [--sections NAME,...] [--minutes 6] [--data FOLDER] [--output FILE]     # scripts/gpu_check runs it

Each section of `gpu_sections.py` runs in a process of its own, in the order of its worth, as long as the minutes last: one
that runs out of memory, crashes or hangs ends none of the others. Rows appear as they are measured; `--output` keeps them and
their figures as lines of JSON. `--data` holds real volumes for the end-to-end section (else it makes some). `--device cpu` runs
it all very small, to see that the program works.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_sections as sections

SECTIONS = {  # the most valuable first, with the seconds that each may take and what must be left for it to start
    "machine": (sections.machine, 60, 0),
    "train": (sections.train_compiled, 200, 60),
    "unfolded": (sections.train_unfolded, 80, 50),
    "attention": (sections.attention, 60, 20),
    "end_to_end": (sections.end_to_end, 200, 60),
    "segmentation": (sections.segmentation, 150, 40),
    "eager": (sections.train_eager, 80, 30),
    "budget": (sections.train_budget, 100, 60),
    "fp16": (sections.train_fp16, 100, 60),
    "small_batch": (sections.train_small_batch, 80, 50),
    "embed": (sections.embed, 60, 25),
    "probe": (sections.probe, 30, 10),
    "nccl": (sections.nccl, 60, 20),
}


@dataclass
class Report:
    """The table: printed row by row, kept in a file that the sections' processes share."""

    file: Path

    def row(self, what: str, measured: str, **figures: float) -> None:
        print(f"| {what} | {measured} |", flush=True)
        with self.file.open("a") as out:
            out.write(json.dumps({"what": what, "measured": measured, **figures}) + "\n")

    def figure(self, name: str) -> float | None:
        """The last figure of this name, of any section."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        found = [row[name] for row in map(json.loads, lines) if name in row]
        return found[-1] if found else None


def run_section(name: str, report: Report, args: argparse.Namespace, seconds: float) -> str | None:
    """Why a section failed; None where it did not."""
    section, _, _ = SECTIONS[name]
    process = multiprocessing.get_context("fork").Process(target=_child, args=(section, report, args))
    process.start()
    process.join(seconds)
    reason = None if process.exitcode == 0 else f"failed (exit code {process.exitcode})"
    if process.is_alive():
        reason = f"stopped after {seconds:.0f} s"
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it started too
    process.join()
    return reason


def _child(section: Any, report: Report, args: argparse.Namespace) -> None:
    os.setsid()
    section(report, args)
    sys.stdout.flush()
    os._exit(0)  # without a wait for threads of the compiler


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=6, help="sections that do not fit any more are left out")
    parser.add_argument("--data", type=Path, help="folder of real volumes")
    parser.add_argument("--output", type=Path, help="file for the rows and their figures (JSON lines)")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed together, calls of an operator")
    parser.add_argument("--batches", default="64,128", help="volumes of a training step")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sharded-step", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sharded_step:
        sections.sharded_step(args.device)
        return 0
    names = args.sections.split(",")
    if unknown := sorted(set(names) - set(SECTIONS)):
        parser.error(f"--sections {','.join(unknown)}: choose among {', '.join(SECTIONS)}")
    if args.device == "cuda" and not sections.has_gpu():
        print("no NVIDIA GPU that this torch can use: `dinov2 doctor` says more", file=sys.stderr)
        return 2
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Report(args.output.resolve() if args.output else Path(folder, "rows.json"))
        report.row("what", "measured")
        report.row("---", "---")
        failed = 0
        for name in names:
            _, limit, least = SECTIONS[name]
            left = 60 * args.minutes - (time.perf_counter() - started)
            if left < least:
                report.row(f"section {name}", f"left out: {left:.0f} s of --minutes {args.minutes:g} remain")
                continue
            began = time.perf_counter()
            reason = run_section(name, report, args, min(limit, left))
            failed += reason is not None
            report.row(f"section {name}", f"{time.perf_counter() - began:.0f} s{'; ' + reason if reason else ''}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
