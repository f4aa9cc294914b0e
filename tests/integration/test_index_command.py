"""`dinov2 index` as a process: killed, stopped, started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.processes import environment, left_after, wait_for_children

NUM_FILES = 120


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Volumes that take a moment each, one of them broken, two the same."""
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for i in range(NUM_FILES):
        nib.save(nib.Nifti1Image(rng.integers(0, 900, (40, 40, 40)).astype(np.int16), np.eye(4)), data / f"{i:03d}.nii.gz")
    (data / "copy.nii.gz").write_bytes((data / "007.nii.gz").read_bytes())
    (data / "broken.nii.gz").write_bytes(bytes(3000))
    return data


def start(folder: Path, output: Path, *flags: str, mark: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dinov2", "index", str(folder), "--output", str(output), "--id-salt", "one", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, env=environment(mark), **pipes)


def finish(folder: Path, output: Path, *flags: str) -> str:
    process = start(folder, output, *flags)
    said, problems = process.communicate(timeout=200)
    assert process.returncode == 0, problems
    return said


def wait_for_lines(journal: Path, count: int) -> None:
    deadline = time.monotonic() + 100
    while not journal.exists() or journal.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stop(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Send it to the whole job, as a terminal and a scheduler do."""
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=100)
    return said


@pytest.mark.slow
@pytest.mark.parametrize("number, workers", [(signal.SIGKILL, 2), (signal.SIGINT, 2), (signal.SIGTERM, 0)])
def test_a_stopped_index_continues_and_equals_an_undisturbed_one(
    folder: Path, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, stopped = tmp_path / "a" / "list.json", tmp_path / "b" / "list.json"
    finish(folder, whole, "--workers", "0")
    process = start(folder, stopped, "--workers", str(workers))
    wait_for_lines(tmp_path / "b" / "list.index.jsonl", 20)
    said = stop(process, number)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 75)
    assert ("same command continues" in said) == (number != signal.SIGKILL)
    assert not stopped.exists()
    with (tmp_path / "b" / "list.index.jsonl").open("ab") as file:
        file.write(b'{"unit": "a line that was cut sho')  # what a kill can leave
    said = finish(folder, stopped, "--workers", "0")
    todo = int(said.split("; ")[1].split(" new")[0])
    assert 0 < todo < NUM_FILES - 10  # it went on, and not from the start
    for name in ("list.json", "list.quarantine.json", "list.index.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert len(json.loads(stopped.read_text())) == NUM_FILES


@pytest.mark.slow
def test_an_index_killed_while_its_processes_start_leaves_none_of_them(folder: Path, tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    for delay in np.linspace(0, 0.6, 13):
        process = start(folder, tmp_path / "list.json", "--workers", "2", mark=mark)
        wait_for_children(process)
        time.sleep(delay)
        process.kill()  # the main process alone
        process.wait()
        assert not left_after(mark, 10), f"{delay:.2f} s after the first was started"
