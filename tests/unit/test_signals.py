"""Processes end with the one that started them, at whatever moment of their start it is killed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.processes import environment, left_after, marked

SPAWNED = """
import multiprocessing, pathlib, sys, time
from dinov2.data.pool import unordered

if __name__ != "__main__":  # a process that starts is here, all that it needs to start has been handed over to it
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(1)
else:
    list(unordered(time.sleep, [600] * 4, 2))
"""
LATE = """
import pathlib, sys, time
from dinov2.data.pool import unordered

def late():
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(600)  # as what the work imports, which may take long

class Work:
    def __reduce__(self):
        return late, ()

if __name__ == "__main__":
    list(unordered(Work(), [600] * 4, 2))
"""
FORKED = """
import itertools, pathlib, sys, time
from dinov2.data import workers

asked = workers.die_with_parent

def late():
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(1)  # while which there is work for it in its pipe
    asked()

workers.die_with_parent = late
list(workers.compute_in_order(time.sleep, itertools.repeat(600), 2))
"""

ANSWERING = """
import itertools, pathlib, sys, torch
from dinov2.data.workers import compute_in_order

for answer in compute_in_order(torch.zeros, itertools.repeat(1000), 2):
    pathlib.Path(sys.argv[1]).touch()
"""


@pytest.mark.parametrize("program", [SPAWNED, LATE, FORKED], ids=["spawned", "spawned late", "forked"])
def test_a_process_whose_parent_is_killed_while_it_starts_ends_too(tmp_path: Path, program: str) -> None:
    (tmp_path / "program.py").write_text(program)
    mark, begun = uuid.uuid4().hex, tmp_path / "begun"
    words = [sys.executable, str(tmp_path / "program.py"), str(begun)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    parent = subprocess.Popen(words, cwd=ROOT, env=environment(mark, PYTHONPATH=str(ROOT)), **quiet)
    while parent.poll() is None and not begun.exists():
        time.sleep(0.01)
    time.sleep(0.4)
    shared = [pid for pid in marked(mark) if "/dev/shm/" in Path(f"/proc/{pid}/maps").read_text()]
    parent.kill()
    parent.wait()
    assert marked(mark), "they were starting"
    assert not shared  # a semaphore with a name stays where all processes of a group are killed at once
    assert not left_after(mark, 10)


@pytest.mark.parametrize("prefix", ["t", "t" * 100], ids=["short", "long"])
def test_loader_processes_whose_parent_is_killed_leave_nothing_among_temporary_files(tmp_path: Path, prefix: str) -> None:
    """Of the tensors that they hand over; a folder with a long name, as a scheduler's may be, has no place for a socket."""
    (tmp_path / "program.py").write_text(ANSWERING)
    mark, begun = uuid.uuid4().hex, tmp_path / "begun"
    words = [sys.executable, str(tmp_path / "program.py"), str(begun)]
    with tempfile.TemporaryDirectory(prefix=prefix, dir="/tmp") as temporary:
        parent = subprocess.Popen(words, cwd=ROOT, env=environment(mark, PYTHONPATH=str(ROOT), TMPDIR=temporary))
        while parent.poll() is None and not begun.exists():
            time.sleep(0.01)
        parent.kill()
        parent.wait()
        assert not left_after(mark, 10)
        assert begun.exists() and not list(Path(temporary).rglob("*"))
