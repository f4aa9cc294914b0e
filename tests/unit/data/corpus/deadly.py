"""Work of an index that a process does not survive, in a module that loads fast: each process imports it anew."""

from __future__ import annotations

import multiprocessing
import os
import signal
from unittest.mock import patch

from dinov2.data.corpus.index import examine as examine_module
from dinov2.data.corpus.index.examine import ExamineOptions, Row, examine
from dinov2.data.corpus.index.walk import Unit


def examine_until_a(options: ExamineOptions, units: tuple[Unit, ...]) -> list[tuple[Unit, list[Row]]]:
    """As `examine`; a process of several that comes to `a.nii` ends there, as for want of memory."""
    if any("a.nii" in unit.path for unit in units) and multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)
    return examine(options, units)


def examine_with_a_fault(
    where: str, error: Exception, options: ExamineOptions, units: tuple[Unit, ...]
) -> list[tuple[Unit, list[Row]]]:
    """As `examine`; a function that it calls raises an error at `a.nii`."""
    right = getattr(examine_module, where)

    def wrong(*args: object, **kwargs: object) -> object:
        if "a.nii" in str(args[0]):
            raise error
        return right(*args, **kwargs)

    with patch.object(examine_module, where, wrong):
        return examine(options, units)
