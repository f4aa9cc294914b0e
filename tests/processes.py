"""Processes by a mark in their environment, which all that they start inherit: what is left of a program that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

MARK = "DINOV2_TEST_MARK"
ENDED = ("Z", "X")  # states of a process that has ended and waits for its parent to notice


def marked(mark: str) -> list[int]:
    """Ids of the processes that live and carry a mark."""
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal() and _carries(folder, mark)]


def _carries(process: Path, mark: str) -> bool:
    try:
        words = (process / "environ").read_bytes().split(b"\0")
        state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:  # ended, or another user's
        return False
    return f"{MARK}={mark}".encode() in words and state not in ENDED


def left_after(mark: str, seconds: float) -> list[int]:
    """The processes that carry a mark and have not ended within some seconds; they are ended then."""
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def environment(mark: str, **more: str) -> dict[str, str]:
    """This process's, with a mark, for one that is to be started."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more, MARK: mark}


def wait_for_children(process: subprocess.Popen[str], seconds: float = 100) -> None:
    """Until it has started a process."""
    deadline = time.monotonic() + seconds
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
