"""Requests to stop, noted for the loop instead of ending it at once; processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # schedulers send the last two before a time limit


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """A list that a signal (the first Ctrl-C) adds its name to; the loop stops after the step it is in."""
    received: list[str] = []

    def note(number: int, _frame: object) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    before = {s: signal.signal(s, note) for s in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """End this process, one of multiprocessing's, at once when the one that started it ends, or where it has ended already.

    A loader process that outlives a killed run for some seconds would hold on to what it inherited, the lock of the output
    folder among it, and the same command started again would find the folder in use. Linux is asked to end it; that says
    nothing of a parent that ended before, while this process was starting, and whose work it would wait for without end.
    """
    parent = multiprocessing.parent_process()
    die_with(None if parent is None else parent.pid)


def die_with(parent: int | None) -> None:
    """End this process at once when its parent, of that number, ends, or where it has ended already.

    As subprocess's `preexec_fn` it is of the program that is started; the parent is the thread that starts it.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:  # asked for first, looked for then: no moment is between the two
        os.kill(os.getpid(), signal.SIGKILL)
