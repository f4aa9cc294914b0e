"""Cells run once, whatever is killed when; what fails is told with its reason; what is there is never run again."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_RESUMABLE, BadInput
from dinov2.eval.study import command, records, runner
from dinov2.eval.study.cells import Cell, cells_of, labelled_sets
from dinov2.eval.study.schema import Study, load_study
from dinov2.eval.study.table import collect
from tests.conftest import ROOT
from tests.unit.eval.study import standin
from tests.unit.eval.study.conftest import STANDIN

DRIVER = f"""
import functools, sys
from dinov2.eval.study import command, runner
from dinov2.logging import setup_logging
setup_logging()
runner.POLL_S = 0.02
command.run_cells = functools.partial(runner.run_cells, program={STANDIN!r})
sys.exit(command.main(sys.argv[1:], print))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL_S", 0.01)
    monkeypatch.setattr(command, "run_cells", partial(runner.run_cells, program=STANDIN))


def cells(study: Study) -> list[Cell]:
    return cells_of(study, labelled_sets(study))


def states(study: Study) -> dict[str, str]:
    return {cell.name: records.state_of(cell).name for cell in cells(study)}


def run(path: Path, *words: str) -> int:
    return command.main(["run", str(path), *words], lambda _: None)


def tables(study: Study) -> dict[str, bytes]:
    return {name: (study.output / name).read_bytes() for name in ("items.csv", "runs.csv", "items.parquet", "runs.parquet")}


def counted(study: Study) -> None:
    """Every cell has every iteration once, and was never started when it was finished."""
    for cell in cells(study):
        lines = (cell.folder / "iterations.txt").read_text().splitlines()
        assert [int(line.split()[0]) for line in lines] == list(range(standin.ITERATIONS)), cell.name
        assert not (cell.folder / "repeated").exists(), cell.name
        assert not (cell.folder / "unheld").exists(), cell.name  # its process has the lock too


def test_a_study_runs_every_cell_once_and_collects(study: Study, study_file: Path) -> None:
    assert set(states(study).values()) == {records.PENDING}
    assert run(study_file, "--gpus", "4,7") == EXIT_OK
    assert set(states(study).values()) == {records.FINISHED}
    counted(study)
    devices = {line.split()[1] for c in cells(study) for line in (c.folder / "iterations.txt").read_text().splitlines()}
    assert devices == {"4", "7"}  # each of them one at a time
    before = tables(study)
    assert run(study_file) == EXIT_OK  # nothing is left to do
    counted(study)
    assert tables(study) == before


def test_killed_at_random_moments_a_study_ends_with_each_cell_run_once_and_the_same_table(
    study: Study, study_file: Path, tmp_path: Path
) -> None:
    assert run(study_file, "--jobs", "4", f"output_dir={tmp_path / 'whole'}") == EXIT_OK
    whole = tables(load_study(study_file, [f"output_dir={tmp_path / 'whole'}"]))
    words = [sys.executable, "-c", DRIVER, "run", str(study_file), "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STANDIN_SLEEP_S": "0.03"}
    rng, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        wait_until_started(study, process)
        try:
            _, log = process.communicate(timeout=rng.uniform(0.05, 0.7) if kills < 4 else 60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL if kills % 3 else signal.SIGTERM)
            _, log = process.communicate()
            assert process.returncode in (-signal.SIGKILL, EXIT_RESUMABLE), log
            kills += 1
            continue
        assert process.returncode == EXIT_OK, log
        break
    assert kills == 4
    counted(study)
    assert tables(study) == whole


def wait_until_started(study: Study, process: subprocess.Popen[str]) -> None:
    """Until a runner is at work, or ends: what a cell was begun with is written when it starts."""
    began = time.time() - 0.05
    while process.poll() is None and not any(p.stat().st_mtime > began for p in study.cells.glob("*/*/*/*/cell.json")):
        time.sleep(0.01)


def test_a_runner_that_is_killed_takes_its_cells_along(study: Study, study_file: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STANDIN_SLEEP_S": "100"}
    words = [sys.executable, "-c", DRIVER, "run", str(study_file)]
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, text=True
    )
    first = cells(study)[0]
    while process.poll() is None and not (first.folder / "begun").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while records.is_held(first.folder):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert records.state_of(first).name == records.UNFINISHED


def test_a_second_runner_waits_for_the_cells_of_the_first(study: Study, study_file: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STANDIN_SLEEP_S": "0.02"}
    words = [sys.executable, "-c", DRIVER, "run", str(study_file), "--jobs", "3"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    both = [subprocess.Popen(words, cwd=ROOT, env=environment, **quiet) for _ in range(2)]
    assert [process.wait(300) for process in both] == [EXIT_OK, EXIT_OK]
    counted(study)


def test_a_cell_that_fails_is_listed_with_its_reason_and_tried_again_by_the_next_run(
    study: Study, study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_BROKEN", "balls/Random")
    assert run(study_file, "--jobs", "2") == EXIT_BAD_INPUT
    said: list[str] = []
    assert command.main(["status", str(study_file)], said.append) == EXIT_OK
    assert said[0] == "small: 8 finished, 4 failed"
    failed = [line for line in said if ": failed:" in line]
    assert len(failed) == 4 and all("exit code 2: 12:00:00 E dinov2: a reason of its own" in line for line in failed)
    assert collect(study, said.append) == EXIT_BAD_INPUT  # what is finished is in the tables, the others are named
    assert any(line.startswith("not in the tables: balls/Random/25/0: failed: exit code 2") for line in said)
    monkeypatch.delenv("STANDIN_BROKEN")
    assert run(study_file) == EXIT_OK
    counted(study)


@pytest.mark.parametrize("batch, advice", [(4, "batch_size: 2"), (1, "its batch_size is 1: use a device with more memory")])
def test_a_cell_that_ran_out_of_memory_proposes_half_its_batch(
    study_file: Path, monkeypatch: pytest.MonkeyPatch, batch: int, advice: str
) -> None:
    monkeypatch.setenv("STANDIN_BROKEN", "ages/Random/100/1")
    words, only = [f"budget.batch_size={batch}"], ["--cells", "ages/Random/100/1"]
    assert run(study_file, *words, *only) == EXIT_BAD_INPUT
    study = load_study(study_file, words)
    reason = {c.name: records.state_of(c).reason for c in cells(study)}["ages/Random/100/1"]
    assert reason.startswith("out of memory (exit code 1: CUDA out of memory)") and advice in reason
    if batch > 1:
        assert "methods.Random.by_dataset.ages.batch_size: 2" in reason
        monkeypatch.delenv("STANDIN_BROKEN")  # the cell had saved nothing: with half the batch it is no changed cell
        assert run(study_file, *words, "methods.Random.by_dataset.ages.batch_size=2", *only) == EXIT_OK


@pytest.mark.parametrize("damage", ["cut results", "other results", "cut table", "no table", "a case less", "words"])
def test_damaged_results_are_said_and_made_again(
    study: Study, study_file: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = "balls/3DINO/25/0"
    assert run(study_file, "--cells", name) == EXIT_OK
    cell = next(c for c in cells(study) if c.name == name)
    results, table = cell.folder / "results.json", cell.folder / "per_case.csv"
    before = (results.read_bytes(), table.read_bytes())
    lines = table.read_text().splitlines(keepends=True)
    if damage == "cut results":
        results.write_bytes(before[0][:-9])
    elif damage == "other results":
        results.write_text(json.dumps({**json.loads(before[0]), "test": {"per_class": []}}))
    elif damage == "no table":
        table.unlink()
    else:
        cut = {
            "cut table": "".join(lines)[:-3],
            "a case less": "".join(lines[:-2]),
            "words": "".join(lines).replace("1.5", "x", 1),
        }
        table.write_text(cut[damage])
    state = records.state_of(cell)
    assert state.name == records.DAMAGED and str(cell.folder) in state.reason
    if damage == "a case less":  # told where the list is not there, too
        elsewhere = load_study(study_file, ["base_data_dir=nowhere"])
        assert records.state_of(next(c for c in cells(elsewhere) if c.name == name)).name == records.DAMAGED
    with caplog.at_level("WARNING"):
        assert run(study_file, "--cells", name) == EXIT_OK
    assert "results are damaged" in caplog.text and "it is run again" in caplog.text
    assert (results.read_bytes(), table.read_bytes()) == before
    assert [p.name for p in (cell.folder / "previous_1").iterdir()]


def test_a_study_changed_after_cells_ran_is_refused_with_the_changed_cells(
    study: Study, study_file: Path, tmp_path: Path
) -> None:
    assert run(study_file) == EXIT_OK
    for words, what in (
        (["budget.epochs=5"], "epochs was 3, is 5"),
        (["methods.3DINO.weights=demo"], "pretrained-weights was random, is demo"),
        (["methods.3DINO.head=UNETR"], "segmentation-head was Linear, is UNETR"),
    ):
        with pytest.raises(BadInput) as err:
            run(study_file, *words)
        assert "balls/3DINO/25/0" in str(err.value) and what in str(err.value) and "\n" not in str(err.value)
        with pytest.raises(BadInput, match="ran before the study was changed"):
            collect(load_study(study_file, words), lambda _: None)
        assert ("Random" in str(err.value)) == ("budget" in words[0])  # only those that differ are named
    moved = ["num_workers=3", f"cache_dir={tmp_path / 'elsewhere'}"]  # what decides nothing may change
    assert run(study_file, *moved) == EXIT_OK
    listed = tmp_path / "data" / "balls_100_datalist.json"
    content = json.loads(listed.read_text())
    content["test"][0]["case"] = "another"
    listed.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="balls/3DINO/25/0: other test cases"):
        run(study_file)
    counted(study)
    assert run(study_file, "--rerun-changed", "--jobs", "4") == EXIT_OK
    rows = list(csv.DictReader((study.output / "items.csv").open()))
    assert "another" in {row["case"] for row in rows if row["dataset"] == "balls"}
    assert all((c.folder / "previous_1" / "results.json").exists() == (c.dataset == "balls") for c in cells(study))


@pytest.mark.parametrize(
    "words, what",
    [
        (["--cells", "balls/3DIN/25/0"], "no such cell .did you mean 'balls/3DINO/25/0'"),
        (["--jobs", "0"], "at least 1"),
        (["--gpus", "0,0"], "each once"),
        (["--gpus", "0", "--jobs", "2"], "one cell has a GPU to itself"),
        (["methods.3DINO.weights=none.pth"], "methods.3DINO.weights: none.pth: no such file"),
        (["base_data_dir=nowhere"], "balls: datalist nowhere/balls_100_datalist.json"),
        (["datasets.balls.percents=[1]"], "balls: --dataset-percent 1 of 8 training cases is none"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_does(study: Study, study_file: Path, words: list[str], what: str) -> None:
    with pytest.raises(BadInput, match=what):
        run(study_file, *words)
    assert not study.output.exists()


@pytest.mark.parametrize(
    "text, found",
    [
        ("21:00:01 I a: fine\n21:00:02 E a: wrong: do that\nbye\n", "21:00:02 E a: wrong: do that"),
        (
            "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n[rank0]: x\n",
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        ("linear3d.py: error: unrecognized arguments: --head\n", "unrecognized arguments: --head"),
        ("only words\n\n", "only words"),
        ("", "its log is empty"),
    ],
)
def test_the_reason_is_the_last_error_of_a_log(text: str, found: str) -> None:
    assert found in runner.last_error(text)


def test_the_reason_is_of_the_last_try_alone(tmp_path: Path) -> None:
    log = tmp_path / "cell.log"
    log.write_text("21:00:02 E a: an earlier reason\nnow\n")
    assert runner.last_error(runner._tail(log, log.stat().st_size - 4)) == "now"


def test_a_killed_cell_is_taken_for_one_without_memory(study: Study, tmp_path: Path) -> None:
    cell = cells(study)[0]
    dying = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert runner.run_cells([cell], [{}], dying) == EXIT_BAD_INPUT
    state = records.state_of(cell)
    assert state.name == records.FAILURE and "most likely for want of memory (ended by SIGKILL" in state.reason
    assert "batch_size: 1" in state.reason
