"""A training once more, killed in the middle and started again: does it come to the same weights?"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from dinov2.checkpointer.teacher import read_teacher
from dinov2.errors import BadInput
from dinov2.logging import read_metrics
from dinov2.signals import die_with

_LOOK_S = 0.05  # between two looks at the metrics


def train_and_kill(arguments: Sequence[str], run: Path, kill_at: int, teacher: Path) -> bool:
    """Train in a process of its own, kill it (SIGKILL) and start it again until it has written a teacher.

    What is there already is not made again.

    Args:
        arguments: Of `dinov2 train`.
        run: The run's folder; its program's words go to `<run>.log`.
        kill_at: Iteration after whose line in the metrics the first process is killed.
        teacher: The file that the second one is waited for.

    Returns:
        Whether a process was killed before it ended.

    Raises:
        BadInput: The training ended by itself, without that file.
    """
    if teacher.exists():
        return True
    killed = _train_until(arguments, run, lambda: _last_iteration(run) >= kill_at)
    if not teacher.exists():
        _train_until(arguments, run, teacher.exists)
    if not teacher.exists():
        words = Path(f"{run}.log").read_text("utf-8", "replace").strip().splitlines() if Path(f"{run}.log").exists() else []
        raise BadInput(f"{run}: its training ended early: {words[-1] if words else 'it said nothing'} ({run}.log)")
    return killed


def same_weights(one: Path, other: Path) -> bool:
    """Whether two teachers are equal bit for bit."""
    (a, _), (b, _) = read_teacher(one), read_teacher(other)
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def _train_until(arguments: Sequence[str], run: Path, is_enough: Callable[[], bool]) -> bool:
    """Whether it was killed because there was enough of it."""
    with Path(f"{run}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dinov2", "train", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=partial(die_with, os.getpid()),
        )
        try:
            while process.poll() is None and not is_enough():
                time.sleep(_LOOK_S)
        finally:
            was_running = process.poll() is None
            process.kill()
            process.wait()
    return was_running


def _last_iteration(run: Path) -> int:
    metrics = run / "training_metrics.json"
    rows = read_metrics(metrics) if metrics.exists() else []
    return int(rows[-1]["iteration"]) if rows else -1
