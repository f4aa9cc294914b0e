"""Work on many items by several processes: results as they come, a few items ahead, so that a stop does not wait for all."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import Any

from dinov2.signals import die_with_parent


def default_workers() -> int:
    """One process per core that this one may use."""
    return len(os.sched_getaffinity(0))


def _start_worker() -> None:
    die_with_parent()  # or it would wait for ever for work from a process that was killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the work
    if "torch" in sys.modules:  # as the main module of a program that has it brought it along
        sys.modules["torch"].set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for a torch that the work itself loads: the processes are the parallelism


def unordered(
    work: Callable[[Any], Any],
    items: Iterable[Any],
    num_workers: int,
    on_death: Callable[[Any], Any] | None = None,
) -> Generator[Any, None, None]:
    """Results of `work` for every item, in any order; 0 workers: in this process.

    Args:
        work: A function that can be pickled, of an item.
        items: Taken as they are needed, two ahead per process.
        num_workers: Processes.
        on_death: Makes the result of an item whose process died (out of memory, a crash of a library); it is tried once more
            alone before. None lets the error through.

    Raises:
        BrokenProcessPool: A process died and there is no `on_death`.
    """
    if num_workers == 0:
        yield from map(work, items)
        return
    todo = iter(items)
    while True:
        suspects: list[Any] = []
        for item, future in _run(work, todo, num_workers):
            error = future.exception()
            if not isinstance(error, BrokenProcessPool):
                yield future.result()
            elif on_death is None:
                raise error
            else:
                suspects.append(item)
        if on_death is None or not suspects:
            return
        for item in suspects:
            [(_, future)] = _run(work, iter([item]), 1)
            yield on_death(item) if isinstance(future.exception(), BrokenProcessPool) else future.result()


def _run(work: Callable[[Any], Any], todo: Iterator[Any], num_workers: int) -> Iterator[tuple[Any, Future[Any]]]:
    """Finished items with their futures, until all are done or the processes broke (then those in flight, failed)."""
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker)
    running: dict[Future[Any], Any] = {}

    def hand_out(count: int) -> None:
        for item in islice(todo, count):
            try:
                running[pool.submit(work, item)] = item
            except BrokenProcessPool as err:  # broke since the last result
                failed: Future[Any] = Future()
                failed.set_exception(err)
                running[failed] = item

    try:
        hand_out(2 * num_workers)
        broken = False
        while running:
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield running.pop(future), future
                broken = broken or isinstance(future.exception(), BrokenProcessPool)
            hand_out(0 if broken else len(finished))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
