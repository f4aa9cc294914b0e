"""Processes that compute a loader's batches, in order, and end it with the reason where one of them dies."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import cycle
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from dinov2.errors import BadInput
from dinov2.signals import SIGNALS, die_with_parent

AHEAD = 2  # requests that a process holds: one that it computes, and the next
GRACE_S = 5.0  # for a process to end by itself
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

Compute = Callable[[Any], Any]


def compute_in_order(compute: Compute, requests: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """`compute(request)` of each of endless requests, in their order, from `num_workers` processes (0: this one).

    Each process has a pipe of its own: there is no lock that one which is killed could take with it, and its end is seen at
    once as the end of its pipe (docs/decisions/005-loader-processes.md).

    Raises:
        BadInput: A process was killed.
        Exception: What `compute` raised in a process, with the traceback from there as a note.
    """
    if num_workers == 0:
        yield from map(compute, requests)
        return
    workers: list[tuple[BaseProcess, Connection]] = []
    end = partial(_end, workers)
    atexit.register(end)  # where an unfinished generator is still referred to then; before multiprocessing waits for them
    try:
        for _ in range(num_workers):
            workers.append(_start(compute, [connection for _, connection in workers]))
        todo = iter(requests)
        for _ in range(AHEAD):
            for worker in workers:
                _send(*worker, next(todo))
        for worker in cycle(workers):
            yield _exchange(*worker, todo)
    finally:
        end()
        atexit.unregister(end)


def _start(compute: Compute, others: list[Connection]) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("fork")  # the volumes' list is inherited, not copied
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(compute, theirs, [*others, ours]), daemon=True)
    process.start()
    theirs.close()  # or its end would not be seen here
    return process, ours


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
    with suppress(EOFError, ConnectionError):  # closed by the main process
        while True:
            connection.send(_answer(compute, connection.recv()))


def _answer(compute: Compute, request: Any) -> tuple[Any, Exception | None]:
    try:
        return compute(request), None
    except Exception as err:  # noqa: BLE001 - raised again in the main process
        err.add_note(f"in a loader process:\n{traceback.format_exc()}")
        return None, err


def _exchange(process: BaseProcess, connection: Connection, todo: Iterator[Any]) -> Any:
    answer = _receive(process, connection)
    _send(process, connection, next(todo))
    return answer


def _send(process: BaseProcess, connection: Connection, request: Any) -> None:
    try:
        connection.send(request)
    except ConnectionError as err:
        raise _died(process) from err


def _receive(process: BaseProcess, connection: Connection) -> Any:
    try:
        value, error = connection.recv()
    except (EOFError, OSError) as err:  # in the message, before it, or while its tensors' shared memory was asked for
        raise _died(process) from err
    if error is not None:
        raise error
    return value


def _died(process: BaseProcess) -> BadInput:
    process.join(GRACE_S)
    code = process.exitcode
    how = "no longer answers" if code is None else f"ended with code {code}"
    if code is not None and code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    why = "most likely memory ran out: use fewer train.num_workers or volumes"
    if code == -signal.SIGBUS:
        why = "most likely shared memory (/dev/shm) ran out: give it more, or use fewer train.num_workers"
    return BadInput(f"loader process {process.pid} {how}: {why}")


def _end(workers: list[tuple[BaseProcess, Connection]]) -> None:
    """Close the pipes; a process ends after the batch it is at, or is ended."""
    for _, connection in workers:
        connection.close()
    for process, _ in workers:
        process.join(GRACE_S)
        if process.is_alive():
            process.kill()
            process.join()
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
