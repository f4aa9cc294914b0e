"""`dinov2 watch`: what a run's files say of it, on one screen."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dinov2.cli import main
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK
from dinov2.logging.folder import locked_folder
from dinov2.watch import BARS, curve, drawn, last_words, read_run, summary, watch
from tests.conftest import Trainer


def text_of(folder: Path) -> str:
    return drawn(summary(read_run(folder, time.time())), 200, 40, has_colour=False)


def cut(folder: Path, rows: int, log_lines: int | None = None) -> None:
    """The folder as it was after some logged iterations, and with fewer lines of the log."""
    for name, count in (("training_metrics.json", rows), ("log.txt", log_lines)):
        path = folder / name
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))


def test_a_run_is_told_by_its_files(trainer: Trainer, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert trainer.call(out).returncode == EXIT_OK
    assert last_words(out / "log.txt")[0] == "finished", "by its log alone"
    text = text_of(out)
    for words in ("FINISHED   12 of 12", "3dino vit_tiny_3d, 3 volumes a step of 2, 1 x cpu", "of log K 2.77", "s/step",
                  "checkpoint 0000011", "process-hours so far", "warnings   none"):  # fmt: skip
        assert words in text, text
    cut(out, rows=5, log_lines=-1)
    assert "DEAD       5 of 12" in text_of(out) and "kill -9" in text_of(out) and "the same command continues" in text_of(out)
    with (out / "log.txt").open("a") as log:
        log.write("07:00:00 I dinov2.train.train3d: stopped after iteration 4 on SIGTERM; start again\n")
        log.write("07:00:01 W dinov2.logging.notify: train.notify (x) ended with 1\n")
    assert "STOPPED    5 of 12" in text_of(out) and "on SIGTERM" in text_of(out)
    with (out / "log.txt").open("a") as log:
        log.write("07:00:02 E dinov2.program: /data: No space left on device\n")
    assert "FAILED     5 of 12" in text_of(out) and "No space left" in text_of(out)
    (out / "warnings.json").write_text(
        '{"iteration": 3, "name": "data_wait", "value": 0.4, "message": "slow\\u001b[2J"}\n{"iter'
    )
    with locked_folder(out):
        text = text_of(out)
        assert "RUNNING    5 of 12" in text and "left, until" in text and "3 data_wait: slow?[2J" in text
        os.utime(out / "training_metrics.json", (0, time.time() - 3600))
        assert "SILENT     5 of 12" in text_of(out) and "last line 60 min ago (usually every" in text_of(out)
        (out / "training_metrics.json").unlink()
        assert "STARTING   no iteration is logged yet" in text_of(out)
    assert "DEAD" not in text_of(out)
    with locked_folder(out):
        pass  # nobody who looks keeps the folder


def write_rows(folder: Path, count: int) -> None:
    rows = [{"iteration": i, "total_loss": 5.0 - i, "iter_time": 2.0} for i in range(count)]
    (folder / "training_metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_it_is_shown_again_when_the_file_grows_until_the_run_has_finished(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("optim: {epochs: 2}\ntrain: {OFFICIAL_EPOCH_LENGTH: 2}\n")
    write_rows(tmp_path, 1)
    shown: list[str] = []
    steps = iter([2, 2, 2, 4])  # logged lines after each wait
    assert watch(tmp_path, once=False, say=shown.append, wait=lambda _: write_rows_if_new(tmp_path, next(steps))) == EXIT_OK
    assert [s.splitlines()[1].split()[1] for s in shown] == ["1", "2", "4"]
    assert "\033" not in "".join(shown), "no terminal, no colours"


def write_rows_if_new(folder: Path, count: int) -> None:
    if len((folder / "training_metrics.json").read_text().splitlines()) != count:
        write_rows(folder, count)


def test_of_a_chain_the_stage_that_wrote_last_is_shown(tmp_path: Path) -> None:
    for age, name in ((100, "second"), (200, "first")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
        write_rows(tmp_path / name, 3)
        os.utime(tmp_path / name / "run.json", (0, time.time() - age))
    shown: list[str] = []
    assert watch(tmp_path, once=True, say=shown.append) == EXIT_OK
    assert shown[0].startswith(f"{tmp_path / 'second'}:") and "cost       0.00 process-hours" in shown[0]


def test_a_screen_is_not_exceeded_and_its_colours_are_the_states() -> None:
    lines = [("31", "x" * 50)] * 10
    assert drawn(lines, 20, 3, has_colour=True).splitlines() == [f"\033[31m{'x' * 20}\033[0m"] * 3


@pytest.mark.parametrize(
    "values, bars", [([3.0], "▁"), ([0.0, 1.0, 2.0], "▁▅█"), ([0.0, 2.0] * 32 + [3.0] * 64, "▁" * 16 + "█" * 16)]
)
def test_a_curve_is_the_means_of_stretches(values: list[float], bars: str) -> None:
    assert curve(values, BARS) == bars


def not_json(folder: Path) -> None:
    (folder / "training_metrics.json").write_text("{}\n")


def not_yaml(folder: Path) -> None:
    write_rows(folder, 1)
    (folder / "config.yaml").write_text("a: [")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda folder: None, "no pretraining has written there yet"),
        (not_json, "line 1: is damaged"),
        (not_yaml, "config.yaml"),
        (lambda folder: (folder / "run.json").write_text("{"), "run.json"),
        (lambda folder: folder.rmdir(), "no such folder"),
    ],
)
def test_what_is_no_run_is_one_line(
    make: Callable[[Path], object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    make(folder)
    assert main(["watch", str(folder), "--once"]) == EXIT_BAD_INPUT
    errors = [line for line in capsys.readouterr().err.splitlines() if " E " in line]
    assert len(errors) == 1 and words in errors[0]
