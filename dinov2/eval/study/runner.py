"""Running cells: each in a process of its own, one after the other or some at a time, on the devices that there are.

Any number of runners may work on one study, on one machine or in the jobs of a cluster: a cell belongs to whoever holds its
lock, which its processes inherit. A runner that is killed takes its cells along; they go on from their checkpoints.

Reading order: `run_cells` -> `_Runner`.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_RESUMABLE, BadInput
from dinov2.eval.study import records
from dinov2.eval.study.cells import Cell
from dinov2.files import write_json
from dinov2.logging.progress import Progress
from dinov2.signals import die_with, stop_requests

logger = logging.getLogger("dinov2.eval.study")

PROGRAM = (sys.executable, "-m", "dinov2")
POLL_S = 0.2
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|MemoryError|Cannot allocate memory|can't allocate memory|bad_alloc", re.I
)
_ERROR_LINE = re.compile(r"^\d\d:\d\d:\d\d [EC] |[\w.]*(Error|Exception)\b.*|.*\berror: ")
_TAIL_BYTES = 2**16


@dataclass
class _Job:
    """A cell that runs."""

    cell: Cell
    process: subprocess.Popen[bytes]
    slot: int
    lock: IO[str]
    log_begins: int  # bytes of the log that are of earlier tries


def run_cells(cells: Sequence[Cell], slots: Sequence[dict[str, str]], program: Sequence[str] = PROGRAM) -> int:
    """Run every cell that is not finished; returns the exit code.

    Args:
        cells: In the order in which they begin.
        slots: As many run at a time; what the environment of each has besides, such as its device.
        program: What takes a cell's words.

    Returns:
        0: all are finished; 2: some failed, what and why is logged; 75: stopped on request, all saved.

    Raises:
        BadInput: A folder cannot be written.
    """
    runner = _Runner(cells, slots, program)
    with stop_requests() as asked, Progress(len(cells), "cells", has_bar=False) as progress:
        while runner.jobs or (runner.waiting and not asked):
            progress.update(runner.reap(bool(asked)))
            if asked:
                runner.stop(asked[0])
            else:
                progress.update(runner.fill())
            time.sleep(POLL_S)
    if runner.stopped or runner.waiting:
        logger.info("stopped: the same command continues")
        return EXIT_RESUMABLE
    for name, reason in runner.failed.items():
        logger.error("%s: %s", name, reason)
    return EXIT_BAD_INPUT if runner.failed else EXIT_OK


class _Runner:
    """The cells that wait, those that run, and how the others ended."""

    def __init__(self, cells: Sequence[Cell], slots: Sequence[dict[str, str]], program: Sequence[str]) -> None:
        self.waiting, self.jobs = list(cells), list[_Job]()
        self.failed: dict[str, str] = {}
        self.stopped: list[str] = []
        self._slots, self._free, self._program = slots, list(range(len(slots))), program
        self._told_of: set[str] = set()
        self._is_stopping = False

    def reap(self, was_asked: bool) -> int:
        """See to the jobs that have ended; how many these are."""
        ended = [job for job in self.jobs if job.process.poll() is not None]
        for job in ended:
            with job.lock:
                self.jobs.remove(job)
                self._free.append(job.slot)
                self._note_end(job, was_asked)
        return len(ended)

    def _note_end(self, job: _Job, was_asked: bool) -> None:
        cell, code = job.cell, job.process.returncode
        reason = _reason(job, code)
        if not reason:
            logger.info("%s: finished", cell.name)
        elif code == EXIT_RESUMABLE or (was_asked and code < 0):
            self.stopped.append(cell.name)
            logger.info("%s: stopped, it goes on with the next run", cell.name)
        else:
            self.failed[cell.name] = reason
            write_json(cell.folder / records.FAILED, {"exit_code": code, "reason": reason})
            logger.warning("%s: failed: %s", cell.name, reason)

    def stop(self, signal_name: str) -> None:
        """Ask all jobs, once, to save and end."""
        if not self._is_stopping:
            self._is_stopping = True
            logger.info("%s: %d cells are asked to save and stop", signal_name, len(self.jobs))
            for job in self.jobs:
                job.process.terminate()

    def fill(self) -> int:
        """Start what waits where a slot is free; returns how many turned out to be finished."""
        num_done = 0
        for cell in list(self.waiting):
            if not self._free:
                break
            lock = records.hold(cell.folder)
            if lock is None:  # another runner's, or one that is just ending: looked at again
                if cell.name not in self._told_of:
                    self._told_of.add(cell.name)
                    logger.info("%s: another process runs it: waiting for it", cell.name)
                continue
            self.waiting.remove(cell)
            if _is_done(cell):
                lock.close()
                num_done += 1
                continue
            slot = self._free.pop(0)
            self.jobs.append(_start(cell, slot, self._slots[slot], lock, self._program))
        return num_done


def _is_done(cell: Cell) -> bool:
    """Whether a cell whose lock is held is finished; damaged results are said and moved aside, so that they are made again."""
    if not (cell.folder / records.RESULTS).exists():
        return False
    try:
        records.read_result(cell)
    except BadInput as err:
        aside = records.set_aside(cell.folder, [records.RESULTS, records.TABLES[cell.task]])
        logger.warning("%s: results are damaged (%s), moved to %s: it is run again", cell.name, err, aside.name)
        return False
    return True


def _start(cell: Cell, slot: int, environment: dict[str, str], lock: IO[str], program: Sequence[str]) -> _Job:
    """Begin or continue a cell; its process holds the lock too."""
    (cell.folder / records.FAILED).unlink(missing_ok=True)
    write_json(cell.folder / records.IDENTITY, cell.identity())
    log = cell.folder / records.LOG
    logger.info("%s: started, log: %s", cell.name, log)
    with log.open("ab") as output:
        log_begins = output.tell()
        process = subprocess.Popen(
            [*program, *cell.command()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            pass_fds=(lock.fileno(),),
            start_new_session=True,  # a terminal's Ctrl-C is this process's, which passes it on once
            preexec_fn=functools.partial(die_with, os.getpid()),
        )
    return _Job(cell, process, slot, lock, log_begins)


def _reason(job: _Job, code: int) -> str:
    """Why a cell is not finished: its exit code, what its log says last, and what to do about memory; empty where it is."""
    cell = job.cell
    if code == EXIT_OK:
        try:
            records.read_result(cell)
            return ""
        except BadInput as err:
            return f"ended without whole results: {err}"
    text = _tail(cell.folder / records.LOG, job.log_begins)
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    says = last_error(text)
    if _OUT_OF_MEMORY.search(says) or code in KILLED:
        what = "out of memory" if _OUT_OF_MEMORY.search(says) else "killed, most likely for want of memory"
        return f"{what} ({how}: {says}): {smaller_batch(cell)}"
    return f"{how}: {says} (log: {cell.folder / records.LOG})"


def smaller_batch(cell: Cell) -> str:
    """What to write into the study for a cell that ran out of memory."""
    batch = cell.batch
    place = f"methods.{cell.method}.by_dataset.{cell.dataset}.batch_size"
    if batch < 2:
        return f"its batch_size is {batch}: use a device with more memory, or a smaller image_size"
    return f"its batch_size is {batch}: try {place}: {batch // 2} (or a device with more memory)"


def _tail(log: Path, begin: int) -> str:
    """The end of a log, from a byte on."""
    try:
        with log.open("rb") as file:
            file.seek(max(begin, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError as err:
        return f"its log cannot be read: {err.strerror}"


def last_error(text: str) -> str:
    """The last line of a log that reads as an error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR_LINE.match(line)]
    return (errors or lines or ["its log is empty"])[-1][:300]
