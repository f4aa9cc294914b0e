"""How far a long command is: a bar on a terminal; elsewhere, as in a job's log, a line a minute."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

logger = logging.getLogger(__name__)

PERIOD_S = 60.0  # between two lines, and before the first: what ends within it says nothing
T = TypeVar("T")


class Progress:
    """Counts what is done of a known number, and says it.

    Args:
        total: How many there are.
        what: Their name, in the plural.
        done: How many were done before, as by a run that is continued.
        has_bar: Draw a bar on a terminal; False where the command's own output goes there meanwhile.
        clock: Seconds.
    """

    def __init__(
        self, total: int, what: str, done: int = 0, has_bar: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.what, self.done = total, what, done
        self._clock, self._first = clock, done
        self._began = self._said = clock()
        self._is_terminal = sys.stderr.isatty()
        self._bar = None
        if self._is_terminal and has_bar and total:
            from tqdm import tqdm  # here: where there is no terminal, nothing needs it

            self._bar = tqdm(total=total, initial=done, desc=what, leave=None)  # None: one inside another goes

    def update(self, count: int = 1, note: str = "") -> None:
        """Some more are done.

        Args:
            count: How many.
            note: What else is to be said of them.
        """
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        now = self._clock()
        if not self._is_terminal and now - self._said >= PERIOD_S and self.done < self.total:
            self._said = now
            logger.info("%s", self._line(now - self._began, note))

    def _line(self, taken_s: float, note: str) -> str:
        each_s = taken_s / max(1, self.done - self._first)
        speed = f"{each_s:.{1 if each_s < 10 else 0}f} s each" if each_s > 1 else f"{1 / each_s:.{1 if each_s > 0.1 else 0}f}/s"
        left = in_words(each_s * (self.total - self.done))
        return f"{self.what}: {self.done} of {self.total}, {speed}, {left} left" + (f", {note}" if note else "")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def track(items: Sequence[T], what: str, has_bar: bool = True) -> Iterator[T]:
    """The items one by one, each counted when the next is asked for; see `Progress`."""
    with Progress(len(items), what, has_bar=has_bar) as progress:
        for item in items:
            yield item
            progress.update()


def in_words(seconds: float) -> str:
    """A time in the units that a person waits in."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"
