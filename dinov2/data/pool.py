"""Work on many items by several processes: results as they come, an item a process, so that a stop does not wait for all.

A process has a pipe and nothing else: no lock that one which is killed could take with it, and no named semaphore, which would
stay in /dev/shm where the whole group is killed at once. What happened to an item is known by the pipe that it went through.

An error that nobody foresaw ends its process, which prints where; so does a library's crash, and both cost one item.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NoReturn

from dinov2.errors import BadInput, is_out_of_memory
from dinov2.signals import die_with_parent


def how_it_ended(code: int | None) -> str:
    """How a process ended before it answered, by its exit code: a predicate, the same in every run."""
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return "ended with an error that nobody foresaw; it stands above" if code == 1 else f"ended with code {code}"


def default_workers() -> int:
    """One process per core that this one may use."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class _Answer:
    """What became of an item."""

    value: Any = None
    error: Exception | None = None
    died: str = ""  # how its process ended before it answered, as `how_it_ended` says it

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


@dataclass(frozen=True)
class _Worker:
    process: SpawnProcess
    connection: Connection

    def send(self, content: Any) -> None:
        with suppress(ConnectionError):  # it died since its last answer: its pipe's end says so
            self.connection.send_bytes(pickle.dumps(content))

    def receive(self) -> _Answer:
        try:
            return _Answer(*pickle.loads(self.connection.recv_bytes()))
        except (EOFError, OSError):  # in the message, or before it
            self.process.join()
            return _Answer(died=how_it_ended(self.process.exitcode))


def _no_remedy(_item: Any, how: str) -> NoReturn:
    raise RuntimeError(f"a worker process {how}")


def unordered(
    work: Callable[[Any], Any],
    items: Iterable[Any],
    num_workers: int,
    on_death: Callable[[Any, str], Any] = _no_remedy,
    parts: Callable[[Any], Iterable[Any]] = lambda item: [item],
) -> Generator[Any, None, None]:
    """Results of `work` for every item, in any order; 0 workers: in this process.

    Args:
        work: A function that can be pickled, of an item.
        items: Taken as they are needed, one per process.
        num_workers: Processes.
        on_death: Makes the result of an item whose process died, from the item and how (`how_it_ended`); it is tried once more
            alone before, after all others. By default that is an error.
        parts: Of such an item, each of which is tried by itself then.

    Raises:
        RuntimeError: A process died, without an `on_death`.
        Exception: What `attempt` hands on, with the traceback from there as a note.
    """
    if num_workers == 0:
        yield from map(work, items)
        return
    suspects: list[Any] = []
    for item, answer in _run(work, iter(items), num_workers):
        if answer.died:
            suspects += parts(item)
        else:
            yield answer.result()
    for item, answer in _run(work, iter(suspects), 1):
        yield on_death(item, answer.died) if answer.died else answer.result()


def _run(work: Callable[[Any], Any], todo: Iterator[Any], num_workers: int) -> Iterator[tuple[Any, _Answer]]:
    """Items with what became of them; a process that died is replaced by another one."""
    workers: dict[Connection, _Worker] = {}
    busy: dict[Connection, Any] = {}

    def hand_out(item: Any, worker: _Worker | None = None) -> None:
        worker = worker or _start(work)
        workers[worker.connection] = worker
        busy[worker.connection] = item
        worker.send(item)

    try:
        for item in islice(todo, num_workers):
            hand_out(item)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                worker, item = workers[connection], busy.pop(connection)
                answer = worker.receive()
                for following in islice(todo, 1):  # before the caller sees the answer, so that the process does not wait for it
                    hand_out(following, None if answer.died else worker)
                yield item, answer
    finally:
        for connection in workers:
            connection.close()  # a process ends after the item that it is at
        for worker in workers.values():
            worker.process.join()


def _start(work: Callable[[Any], Any]) -> _Worker:
    context = get_context("spawn")  # nothing inherited: no other end of a pipe, no thread of a library's that is not there then
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # or its end would not be seen here
    worker = _Worker(process, ours)
    worker.send(work)  # not among the arguments: what it imports may take seconds, in which a parent may be killed
    return worker


def _serve(connection: Connection) -> None:
    """One process: one thread, as the processes are the parallelism."""
    die_with_parent()  # or it would wait for ever for work from a process that was killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the work
    if "torch" in sys.modules:  # as the main module of a program that has it brought it along
        sys.modules["torch"].set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for a torch that the work itself loads
    with suppress(EOFError, ConnectionError):  # closed by the main process
        work = pickle.loads(connection.recv_bytes())
        while True:
            answer = attempt(work, pickle.loads(connection.recv_bytes()), "worker")
            connection.send_bytes(pickle.dumps(answer))


def attempt(work: Callable[[Any], Any], item: Any, kind: str) -> tuple[Any, Exception | None]:
    """What a process sends back: the result, or what was raised, with its traceback as a note, for the main process to raise.

    That is what a user can mend and what the system refused, memory among it. Any other error ends the process.

    Args:
        work: Called with the item.
        item: Its argument.
        kind: Of process, named in the note.
    """
    try:
        return work(item), None
    except (BadInput, OSError, MemoryError, RuntimeError) as err:
        if isinstance(err, RuntimeError) and not is_out_of_memory(err):
            raise
        err.add_note(f"in a {kind} process:\n{traceback.format_exc()}")
        return None, err
