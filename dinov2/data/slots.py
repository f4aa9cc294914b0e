"""Batches in slots of shared memory: loader processes write them, the training process reads them, nothing is copied between.

The memory is one anonymous shared mapping, made before the processes are forked: /dev/shm and its size have no part in it, and
it goes with the last process, however that ends.
"""

from __future__ import annotations

import logging
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2.data.workers import AHEAD, Worker, loader_processes
from dinov2.errors import BadInput

logger = logging.getLogger(__name__)

HELD = 2  # batches that the consumer may refer to before it is given copies: the one it works with, and the next
MIN_FILLING = 2  # batches that processes write at a time

Positions = Sequence[int]
Write = Callable[[np.ndarray, Positions, Sequence[int]], Any]


@dataclass(frozen=True)
class _Task:
    """A process's share of a batch: these volumes of it, into this slot."""

    number: int  # of the batch
    slot: int
    positions: Positions  # of the whole batch
    volumes: list[int]  # indices into it


@dataclass
class _Filling:
    """A batch that is being written."""

    number: int
    slot: int
    positions: Positions
    missing: int = 0  # answers
    answers: list[Any] = field(default_factory=list)


class Slots:
    """`count` pieces of `nbytes`, each free, being written, or lent."""

    def __init__(self, count: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self.free = deque(range(count))
        self.num_lent = 0
        self._stride = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.whole = np.frombuffer(mmap.mmap(-1, count * self._stride), np.uint8)

    def memory(self, slot: int) -> np.ndarray:
        """The slot's bytes."""
        return self.whole[slot * self._stride :][: self.nbytes]

    def lend(self, slot: int) -> np.ndarray:
        """The slot's bytes to read; it is free again when nothing refers to the result, or to a tensor made from it."""
        memory = self.memory(slot)
        self.num_lent += 1
        weakref.finalize(memory, self._returned, slot).atexit = False
        return memory

    def _returned(self, slot: int) -> None:
        self.num_lent -= 1
        self.free.append(slot)


def num_slots(batch_size: int, num_workers: int) -> int:
    """As few as keep every process busy: what the consumer holds, and `AHEAD` volumes for each process."""
    return HELD + max(MIN_FILLING, -(-AHEAD * num_workers // batch_size))


@contextmanager
def slot_queue(
    write: Write, nbytes: int, batches: Iterator[Positions], batch_size: int, num_workers: int, device: torch.device
) -> Iterator[SlotQueue]:
    """A queue of batches with its memory and its processes, which end with the context.

    Args:
        write: Fills some volumes of a batch, in a process.
        nbytes: Of a batch.
        batches: Endless positions of batches.
        batch_size: Volumes of a batch.
        num_workers: Processes.
        device: That the batches go to.

    Raises:
        BadInput: The memory is not there.
    """
    count = num_slots(batch_size, num_workers)
    check_memory(count * nbytes, available_memory())
    slots = Slots(count, nbytes)

    def answer(task: _Task) -> tuple[int, int, Any]:
        return task.number, len(task.volumes), write(slots.memory(task.slot), task.positions, task.volumes)

    with loader_processes(answer, num_workers) as workers, registered(slots, device):
        yield SlotQueue(slots, workers, batches)


class SlotQueue:
    """Batches in the order of their positions; the volumes of each are shared out to the process that has least to do."""

    def __init__(self, slots: Slots, workers: list[Worker], batches: Iterator[Positions]) -> None:
        self._slots, self._batches = slots, batches
        self._workers = {worker.connection: worker for worker in workers}
        self._asked = dict.fromkeys(self._workers, 0)  # volumes that each has still to write
        self._filling: deque[_Filling] = deque()
        self._next_number = 0

    def take(self, wait: bool = True) -> tuple[np.ndarray, Positions, list[Any]] | None:
        """The next batch: its memory, its positions, what `write` returned; None where it is not there yet, without `wait`.

        The memory is the slot itself, or a copy where the consumer still refers to `HELD` batches.

        Raises:
            BadInput: A process was killed.
        """
        while self._slots.free:
            self._hand_out(self._slots.free.popleft())
        batch = self._filling[0]
        while batch.missing:
            if not self._listen(None if wait else 0):
                return None
        self._filling.popleft()
        if self._slots.num_lent < HELD:
            return self._slots.lend(batch.slot), batch.positions, batch.answers
        memory = self._slots.memory(batch.slot).copy()
        self._slots.free.append(batch.slot)
        return memory, batch.positions, batch.answers

    def _hand_out(self, slot: int) -> None:
        batch = _Filling(self._next_number, slot, next(self._batches))
        self._next_number += 1
        self._filling.append(batch)
        shares: dict[Any, list[int]] = {}
        for volume in range(len(batch.positions)):
            idlest = min(self._asked, key=self._asked.__getitem__)
            self._asked[idlest] += 1
            shares.setdefault(idlest, []).append(volume)
        for pipe, volumes in shares.items():
            self._workers[pipe].send(_Task(batch.number, slot, batch.positions, volumes))
        batch.missing = len(shares)

    def _listen(self, timeout_s: float | None) -> bool:
        """Take in what processes have answered; whether anything came."""
        ready = [pipe for pipe in connection.wait(list(self._workers), timeout_s) if isinstance(pipe, connection.Connection)]
        for pipe in ready:
            number, num_volumes, answer = self._workers[pipe].receive()
            self._asked[pipe] -= num_volumes
            batch = self._filling[number - self._filling[0].number]
            batch.answers.append(answer)
            batch.missing -= 1
        return bool(ready)


def check_memory(nbytes: int, available: int | None) -> None:
    """Refuse slots that do not fit into memory, before a process is killed for them.

    Args:
        nbytes: Of one rank's slots; every rank of the machine has its own.
        available: Bytes; None: not known.

    Raises:
        BadInput: They do not.
    """
    needed = nbytes * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if available is not None and needed > available:
        raise BadInput(
            f"batches in shared memory need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free: use a smaller "
            "train.batch_size_per_gpu (train.accumulation_steps keeps the effective batch), or fewer train.num_workers"
        )


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be had now: of the machine and, where there is a limit, of this control group; None where not known."""
    known = [_of_machine(proc / "meminfo"), _of_group(cgroups)]
    return min((value for value in known if value is not None), default=None)


def _of_machine(meminfo: Path) -> int | None:
    try:
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _of_group(folder: Path) -> int | None:
    """What a container (control groups v2) may still take; cached files count as free."""
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limit: "max"
        return None
    return limit - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))


@contextmanager
def registered(slots: Slots, device: torch.device) -> Iterator[None]:
    """Make the slots memory that a CUDA device reads by itself; where that fails, said once, batches are copied to such memory.

    After the processes are forked, so that they inherit nothing of it.
    """
    address = slots.whole.ctypes.data
    if device.type != "cuda" or not _register(torch.cuda.cudart(), address, slots.whole.nbytes, device):
        yield
        return
    try:
        yield
    finally:
        torch.cuda.synchronize(device)  # copies from it
        torch.cuda.cudart().cudaHostUnregister(address)


def _register(cudart: Any, address: int, nbytes: int, device: torch.device) -> bool:
    code = int(cudart.cudaHostRegister(address, nbytes, 0))
    if code == 0:
        return True
    what = "%.1f GiB of shared memory cannot be registered with CUDA (error %d): batches are copied once more on their way"
    logger.warning(what, nbytes / 2**30, code)
    _clear_error(device)
    return False


def _clear_error(device: torch.device) -> None:
    """CUDA keeps an error for whoever asks next, which would be the training."""
    with suppress(RuntimeError):
        torch.zeros(1, device=device)
