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
    for number in item:
        if number == 13:
            os.kill(os.getpid(), 9)
        if number == 17:
            raise OSError("seventeen")
        if number == 19:
            raise KeyError("nineteen")
    return list(item)

def alone(item):
    return [(number,) for number in item]

def died(item, how):
    return [-number for number in item] + [how]

if __name__ == "__main__":
    first, last, num_workers, size = map(int, sys.argv[1:])
    items = [tuple(range(i, min(i + size, last))) for i in range(first, last, size)]
    remedy = () if size == 3 else (died, alone)
    for answer in unordered(work, items, num_workers, *remedy):
        print(*answer, flush=True)
"""


def answers(folder: Path, *numbers: int) -> tuple[list[str], str]:
    """What the program printed before it ended, sorted, and its last words where those were of an error."""
    (folder / "program.py").write_text(PROGRAM)
    words = [sys.executable, str(folder / "program.py"), *map(str, numbers)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    return sorted(done.stdout.splitlines()), done.stderr


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_an_item_that_kills_its_process_costs_only_itself(tmp_path: Path, num_workers: int) -> None:
    found, error = answers(tmp_path, 0, 16, num_workers, 1)
    assert found == sorted(["-13 was ended by SIGKILL", *(str(i) for i in range(16) if i != 13)]) and not error


def test_the_parts_of_an_item_that_kills_its_process_are_tried_alone(tmp_path: Path) -> None:
    found, error = answers(tmp_path, 0, 16, 2, 4)
    assert found == sorted(["0 1 2 3", "4 5 6 7", "8 9 10 11", "12", "14", "15", "-13 was ended by SIGKILL"]) and not error


def test_without_a_remedy_a_process_that_died_is_an_error(tmp_path: Path) -> None:
    found, error = answers(tmp_path, 0, 15, 2, 3)
    assert "12 13 14" not in found and "RuntimeError: a worker process was ended by SIGKILL" in error


def test_an_error_that_nobody_foresaw_costs_its_item_and_is_printed(tmp_path: Path) -> None:
    found, error = answers(tmp_path, 18, 21, 2, 1)
    assert found == ["-19 ended with an error that nobody foresaw; it stands above", "18", "20"]
    assert "KeyError: 'nineteen'" in error and "in work" in error


def test_what_the_system_refuses_is_raised_with_where(tmp_path: Path) -> None:
    found, error = answers(tmp_path, 15, 30, 2, 1)
    assert "17" not in found and "OSError: seventeen" in error and "in a worker process" in error and "in work" in error
