"""Processes that compute what a loader delivers, and end it with the reason where one of them dies."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from dinov2.data.pool import attempt, how_it_ended
from dinov2.errors import BadInput
from dinov2.signals import SIGNALS, die_with_parent

AHEAD = 2  # requests that a process holds: one that it computes, and the next
GRACE_S = 5.0  # for a process to end by itself
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

Compute = Callable[[Any], Any]


@dataclass(frozen=True)
class Worker:
    """A loader process and the pipe to it."""

    process: BaseProcess
    connection: Connection

    def send(self, request: Any) -> None:
        """Ask for something; the process holds requests until it comes to them.

        Raises:
            BadInput: The process was killed.
        """
        try:
            self.connection.send(request)
        except ConnectionError as err:
            raise _died(self.process) from err

    def receive(self) -> Any:
        """The next answer, waited for.

        Raises:
            BadInput: The process was killed.
            RuntimeError: An error that nobody foresaw ended it; its traceback was printed there.
            Exception: What `compute` raised there, as far as `attempt` hands it on.
        """
        try:
            value, error = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as err:  # in the message, or before it
            raise _died(self.process) from err
        if error is not None:
            raise error
        return value


@contextmanager
def loader_processes(compute: Compute, num_workers: int) -> Iterator[list[Worker]]:
    """Processes that answer every request with `compute(request)`; they end with the context, or with the program.

    Each has a pipe of its own: there is no lock that one which is killed could take with it, and its end is seen at once as
    the end of its pipe (docs/decisions/005-loader-processes.md).
    """
    workers: list[Worker] = []
    end = partial(_end, workers)
    atexit.register(end)  # where an unfinished generator is still referred to then; before multiprocessing waits for them
    try:
        for _ in range(num_workers):
            workers.append(_start(compute, [worker.connection for worker in workers]))
        yield workers
    finally:
        end()
        atexit.unregister(end)


def compute_in_order(compute: Compute, requests: Iterable[Any], num_workers: int) -> Generator[Any, None, None]:
    """`compute(request)` of each of endless requests, in their order, from `num_workers` processes (0: this one).

    Raises:
        BadInput: A process was killed.
        Exception: As of `Worker.receive`, with the traceback from there as a note.
    """
    if num_workers == 0:
        for request in requests:
            with one_thread():
                answer = compute(request)
            yield answer
        return
    with loader_processes(compute, num_workers) as workers:
        todo = iter(requests)
        for _ in range(AHEAD):
            for worker in workers:
                worker.send(next(todo))
        for worker in cycle(workers):
            answer = worker.receive()
            worker.send(next(todo))
            yield answer


@contextmanager
def one_thread() -> Iterator[None]:
    """What this process computes by itself is what loader processes would: a Fourier transform rounds by how many share it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _start(compute: Compute, others: list[Connection]) -> Worker:
    context = multiprocessing.get_context("fork")  # the volumes' list is inherited, not copied
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(compute, theirs, [*others, ours]), daemon=True)
    process.start()
    theirs.close()  # or its end would not be seen here
    return Worker(process, ours)


def _serve(compute: Compute, connection: Connection, inherited: list[Connection]) -> None:
    """One process: one thread (the processes are the parallelism), memory kept, signals left to the main process.

    A scheduler signals the whole job; the main process finishes its step, which needs the batches, and then closes the pipe.
    """
    for other in inherited:
        other.close()  # or the other processes would not see the main process close them
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    torch.set_num_threads(1)
    keep_freed_memory()
    with suppress(EOFError, ConnectionError, MemoryError):  # closed by the main process; or no room even for an answer
        while True:
            # plain pickle: multiprocessing's hands tensors over by a socket in a temporary folder, which a kill leaves there
            connection.send_bytes(pickle.dumps(attempt(compute, connection.recv(), "loader")))


def _died(process: BaseProcess) -> BadInput | RuntimeError:
    process.join(GRACE_S)
    code = process.exitcode
    how = "no longer answers" if code is None else how_it_ended(code)
    if code == 1:
        return RuntimeError(f"loader process {process.pid} {how}: `dinov2 index` sets aside by name a file that does so")
    why = "most likely memory ran out: use fewer train.num_workers or volumes"
    if code == -signal.SIGBUS:  # of a mapped file
        why = "a file of the cache folder was cut short while it was read, or its disk failed: start the same command again"
    return BadInput(f"loader process {process.pid} {how}: {why}")


def _end(workers: list[Worker]) -> None:
    """Close the pipes; a process ends after the request it is at, or is ended."""
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        worker.process.join(GRACE_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
    workers.clear()


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where its C library is glibc; elsewhere nothing.

    By default glibc hands blocks of the size of a crop back to the system, and paging in the next one costs about as much
    as computing it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest value it takes
        mallopt(M_TRIM_THRESHOLD, 2**30)
