"""Errors that a user can cause, and their exit codes (docs/architecture.md, "Errors")."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import NoReturn

EXIT_OK = 0
EXIT_LOST_RANK = 1
EXIT_NOT_SHOWN = 1  # of the quick start: what it promises to show was not seen
EXIT_BAD_INPUT = 2
EXIT_COLLAPSED = 3  # train.stop_on_collapse: saved, and not worth continuing as it is
EXIT_RESUMABLE = 75  # stopped on request, start the same command again to continue


class BadInput(ValueError):
    """Input that cannot be used; the message is one line: what, where, what to do. Programs exit with 2.

    It holds names and values as users and files give them: what would break the line, or a terminal, is written as an escape.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class BadVolume(BadInput):
    """One volume of a list that cannot be used; it is named, counted and replaced, the run goes on.

    Attributes:
        reason: One word for the index's quarantine (docs/datasets.md lists them).
    """

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason


_NO_MEMORY = re.compile(  # torch's, ITK's and oneDNN's words, in errors of no class of their own
    r"allocate memory|bad_alloc|could not (create|execute) a (primitive|memory object)"
)


def is_out_of_memory(err: BaseException) -> bool:
    """Whether the machine had no memory left, however Python, numpy, torch or a system call says so; a GPU's is another."""
    if isinstance(err, OSError):
        return err.errno == errno.ENOMEM
    return isinstance(err, MemoryError) or (isinstance(err, RuntimeError) and bool(_NO_MEMORY.search(str(err))))


class LostRank(RuntimeError):
    """Another rank of the job has ended. Programs exit with 1; the rank that ended first says why."""


def replaced(name: str, instead: str) -> Callable[..., NoReturn]:
    """A published name that cannot be a thin door here: it imports, and using it says in one line what takes its place.

    Args:
        name: As it is imported, `dinov2.module.name`.
        instead: What to use.
    """
    line = f"{name} has no counterpart here: use {instead} (FIDELITY.md, Import map)"

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(line)

    refuse.__name__ = refuse.__qualname__ = name.rpartition(".")[2]
    refuse.__doc__ = line
    return refuse
