"""Jobs of a SLURM array whose cells are run by `standin.py`; imports no torch."""

from __future__ import annotations

from functools import partial

from dinov2.eval.study import command, runner
from dinov2.run.submit import Program
from tests.unit.eval.study.conftest import STANDIN


class StandinProgram(Program):
    """A job as the launcher submits it, but for what its cells run."""

    def __call__(self) -> int:
        command.run_cells = partial(runner.run_cells, program=STANDIN)
        return super().__call__()
