"""Requests to stop, noted for the loop instead of ending it at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

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
