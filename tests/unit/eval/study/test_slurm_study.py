"""A study as a SLURM array: which jobs are asked for, without a SLURM."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_RESUMABLE
from dinov2.eval.study import command, runner
from dinov2.eval.study.cells import cells_of, labelled_sets
from dinov2.eval.study.schema import Study
from dinov2.run import submit
from dinov2.run.eval import study as launcher
from tests.unit.eval.study.conftest import STANDIN


def test_an_array_has_a_job_for_every_cell_that_is_left_and_one_that_collects(
    study: Study, study_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(launcher, "submit_array", lambda *args: asked.append(args) or ["7_0", "8"])
    monkeypatch.setattr(runner, "POLL_S", 0.01)
    monkeypatch.setattr(command, "run_cells", partial(runner.run_cells, program=STANDIN))
    words = [str(study_file), "num_workers=2"]
    first = "balls/3DINO/25/0"
    assert command.main(["run", *words, "--cells", first], lambda _: None) == EXIT_OK
    assert launcher.main(["--gpus-per-cell", "2", "--partition", "p", "--timeout", "60", *words]) == EXIT_OK
    programs, last, job, folder, num_gpus = asked[0]
    assert programs[0].argv == ["study", "run", *words, "--cells", "balls/Random/25/0"]
    assert {p.module for p in (*programs, last)} == {"dinov2.cli"} and len(programs) == 11
    assert last.argv == ["study", "collect", *words]
    assert (job.partition, job.timeout, num_gpus) == ("p", 60, 2) and folder == study.output.absolute() / "jobs"
    assert "submitted 7_0, 8" in capsys.readouterr().err
    assert command.main(["run", *words, "--jobs", "4"], lambda _: None) == EXIT_OK
    assert launcher.main(words) == EXIT_OK and len(asked) == 1  # nothing is left
    assert "all cells are finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, what",
    [
        ([], "give the study"),
        (["STUDY", "--jobs", "2"], "give the study, then key=value"),
        (["STUDY", "base_data_dir=nowhere"], "balls: datalist nowhere/balls_100_datalist.json: No such file"),
        (["STUDY", "methods.3DINO.weights=none.pth"], "none.pth: no such file"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_submitted(
    study_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], what: str
) -> None:
    monkeypatch.setattr(launcher, "submit_array", lambda *args: pytest.fail("submitted"))
    assert launcher.main([str(study_file) if w == "STUDY" else w for w in words]) == EXIT_BAD_INPUT
    assert what in capsys.readouterr().err


class Recorder:
    """Stands in for submitit's executor: what the jobs are told, in order."""

    def __init__(self) -> None:
        self.told: list[dict[str, object]] = []

    def update_parameters(self, **parameters: object) -> None:
        self.told.append(parameters)

    def submit(self, program: object) -> SimpleNamespace:
        return SimpleNamespace(job_id="7_0")

    def batch(self) -> AbstractContextManager[None]:
        return nullcontext()


def test_the_last_job_of_an_array_does_not_wait_for_the_success_of_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(submit, "_executor", lambda job, folder: recorder)
    program = submit.Program("dinov2.cli", ["--version"])
    submit.submit_array([program, program], program, SimpleNamespace(), tmp_path)
    assert recorder.told[-1] == {"slurm_additional_parameters": {"dependency": "afterany:7"}}


def test_a_cell_that_leaves_batch_and_input_open_has_its_methods(study: Study) -> None:
    [cell, *_] = cells_of(study, labelled_sets(study))
    settings = {k: v for k, v in cell.settings.items() if k not in ("batch-size", "image-size", "segmentation-head")}
    for model, channels, batch, edge in (("3DINO", 1, 2, 112), ("SwinRandom", 4, 1, 96), ("SwinRandom", 1, 2, 96)):
        own = dataclasses.replace(cell, settings={**settings, "model-name": model}, channels=channels)
        assert (own.batch, own.edge) == (batch, edge), model
    linear = dataclasses.replace(cell, settings={**settings, "model-name": "3DINO", "segmentation-head": "Linear"})
    assert linear.batch == 4


def test_a_run_says_where_the_disk_may_not_hold_what_is_to_come(
    study_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(command, "run_cells", lambda cells, slots: EXIT_RESUMABLE)
    assert command.main(["run", str(study_file), "budget.disk_gib=1000000"], lambda _: None) == EXIT_RESUMABLE
    assert "make room" in caplog.text
