"""A study as an array of a real SLURM's jobs ends with the tables of one that ran here."""

from __future__ import annotations

import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from dinov2.errors import EXIT_OK
from dinov2.eval.study import command, runner
from dinov2.run.eval import study as launcher
from tests.integration.slurm import test_slurm
from tests.unit.eval.study import conftest
from tests.unit.eval.study.jobs import StandinProgram

slurm, study_file = test_slurm.slurm, conftest.study_file  # fixtures
TABLES = ("items.csv", "runs.csv", "items.parquet", "runs.parquet")


@test_slurm.needs_slurm
@pytest.mark.slow
def test_an_array_of_cells_collects_the_table_of_a_study_that_ran_here(
    slurm: None, study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "Program", StandinProgram)
    monkeypatch.setattr(command, "run_cells", partial(runner.run_cells, program=conftest.STANDIN))
    words = [str(study_file), "seeds=[0]", "datasets.balls.percents=[100]"]
    assert command.main(["run", *words], lambda _: None) == EXIT_OK
    here, there = tmp_path / "out", tmp_path / "array"
    cluster = ["--gpus-per-cell", "0", "--cpus-per-task", "1", "--timeout", "5"]
    assert launcher.main([*cluster, *words, f"output_dir={there}"]) == EXIT_OK
    deadline = time.monotonic() + 120
    while not all((there / name).exists() for name in TABLES):
        assert time.monotonic() < deadline, subprocess.run(["squeue"], capture_output=True, text=True).stdout
        time.sleep(0.5)
    assert {(there / name).read_bytes() == (here / name).read_bytes() for name in TABLES} == {True}
    assert len(list(there.glob("cells/*/*/*/*/results.json"))) == 4
