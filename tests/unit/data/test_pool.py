"""Work of several processes, by a program of its own, whose processes start in a moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys
from dinov2.data.pool import unordered

def work(item):
    if item == 13:
        os._exit(1)
    if item == 17:
        raise ValueError("seventeen")
    return item

if __name__ == "__main__":
    on_death = (lambda item: -item) if sys.argv[1] == "goes on" else None
    for answer in unordered(work, range(int(sys.argv[2])), int(sys.argv[3]), on_death):
        print(answer, flush=True)
"""


def answers(folder: Path, *words: str) -> tuple[list[int], str]:
    """What the program printed before it ended, and its last word where that was an error."""
    (folder / "program.py").write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(folder / "program.py"), *words], capture_output=True, text=True, timeout=100)
    return [int(word) for word in done.stdout.split()], done.stderr


@pytest.mark.parametrize("num_workers", ["1", "2", "5"])
def test_an_item_that_kills_its_process_costs_only_itself(tmp_path: Path, num_workers: str) -> None:
    found, error = answers(tmp_path, "goes on", "16", num_workers)
    assert sorted(found) == [-13, *(i for i in range(16) if i != 13)] and not error


def test_without_a_remedy_a_process_that_died_is_an_error(tmp_path: Path) -> None:
    found, error = answers(tmp_path, "ends", "16", "2")
    assert 13 not in found and "BrokenProcessPool: process" in error and "ended with code 1" in error


def test_what_an_item_raises_is_raised_with_where(tmp_path: Path) -> None:
    found, error = answers(tmp_path, "goes on", "30", "2")
    assert 17 not in found and "ValueError: seventeen" in error and "in a worker process" in error and "in work" in error
