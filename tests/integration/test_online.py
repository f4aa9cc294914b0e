"""Online evaluation: what it says, that training does not notice it, kept through kills, refused before training starts."""

from __future__ import annotations

import json
import logging
import math
import os
import runpy
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig

from dinov2 import distributed
from dinov2.data.corpus.index.examine import content_sha
from dinov2.data.corpus.overlap import warn_of_listed
from dinov2.data.datalist import Entry
from dinov2.distributed import while_others_wait
from dinov2.distributed.runtime import Runtime
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, BadInput, LostRank
from dinov2.logging import MetricWriter
from dinov2.run.train import pretrain, train
from dinov2.train import train3d
from dinov2.train.evaluation import OnlineEvaluation
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.conftest import SMALL, TIMING, read_json_lines
from tests.started import free_port, in_ranks, run_ranks

SmallConfig = Callable[..., DictConfig]
KINDS = {"knn": "grain", "linear": "grain", "readout": "ball", "retrieval": "ball"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Balls off the middle of a scan, smooth or grainy, with a label map of ball and core; lists of both tasks."""
    folder = tmp_path_factory.mktemp("balls")
    rows = []
    for i in range(12):
        rng = np.random.default_rng(i)
        axes = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (26, 24, 22)], indexing="ij"))
        distance = np.linalg.norm(axes - rng.uniform(-0.2, 0.2, 3)[:, None, None, None], axis=0)
        image = 20 + (distance < 0.8) * (100 + rng.normal(0, [3, 30][i % 2], distance.shape)) + 80 * (distance < 0.4)
        label = (distance < 0.8).astype(np.uint8) + (distance < 0.4)
        for name, values in (("image", image.astype(np.float32)), ("label", label)):
            nib.save(nib.Nifti1Image(values, np.eye(4)), folder / f"{name}{i}.nii")
        rows.append((f"image{i}.nii", f"label{i}.nii", i % 2))
    parts = {"training": rows[:6], "validation": rows[6:10], "test": rows[10:]}
    for name, place in (("ball_100", 1), ("grain_cls", 2)):
        content = {part: [{"image": row[0], "label": row[place]} for row in of] for part, of in parts.items()}
        (folder / f"{name}_datalist.json").write_text(json.dumps({"shuffle_seed": 0, **content}))
    (folder / "ball.yaml").write_text("task: segmentation\nclasses: {0: background, 1: ball, 2: core}\n")
    (folder / "grain.yaml").write_text("task: classification\nclasses: {0: smooth, 1: grainy}\n")
    (folder / "list.json").write_text(json.dumps([{"image": row[0], "shape": [26, 24, 22]} for row in rows[:4]]))
    return folder


def words(data: Path, out: Path, *extra: str, kinds: dict[str, str] | None = None) -> list[str]:
    """A training of 12 steps, measured before it and after every six."""
    chosen = KINDS if kinds is None else kinds
    tasks = [f"{{kind: {kind}, dataset: {data / name}.yaml, base_data_dir: {data}}}" for kind, name in chosen.items()]
    online = [f"evaluation.tasks=[{', '.join(tasks)}]", "evaluation.tasks_period_iterations=6"] if tasks else []
    where = [f"train.dataset_path={data / 'list.json'}", f"train.cache_dir={data / 'cache'}", f"train.output_dir={out}"]
    return [*SMALL, *where, *online, *extra]


def rows_of(out: Path, name: str = "evaluation_metrics.json") -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_json_lines(out / name)]


def teacher(out: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(out / "eval" / name / "teacher_checkpoint.pth", weights_only=True)["teacher"]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all kinds of tasks, whose best teacher is kept."""
    out = tmp_path_factory.mktemp("whole")
    extra = ["train.keep_best=readout-ball/dice", "evaluation.eval_period_iterations=6"]
    assert pretrain.main(words(data, out, *extra)) == EXIT_OK
    return out


def test_training_does_not_notice_that_it_is_measured(data: Path, whole: Path, tmp_path: Path) -> None:
    assert train3d.main(words(data, tmp_path, kinds={})) == EXIT_OK
    assert not (tmp_path / "evaluation_metrics.json").exists()
    measured, plain = (rows_of(out, "training_metrics.json") for out in (whole, tmp_path))
    assert len(plain) == 12 and measured == plain
    kept, other = (teacher(out, "training_11") for out in (whole, tmp_path))
    assert kept.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in kept.items())


def test_every_task_says_what_it_knows_and_the_best_teacher_is_kept(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = rows_of(whole)
    names = ["knn-grain/auc", "knn-grain/balanced_accuracy", "linear-grain/auc", "linear-grain/balanced_accuracy"]
    names += ["readout-ball/dice", "retrieval-ball/median_mm"]
    assert [list(row) for row in rows] == [["iteration", *names]] * 3
    assert [row["iteration"] for row in rows] == [-1, 5, 11]
    for row in rows:  # grain and brightness are seen by any network, places less so
        assert min(row["knn-grain/auc"], row["linear-grain/auc"]) > 0.85 and 0.5 < row["readout-ball/dice"] < 1, row
        assert 0 < row["retrieval-ball/median_mm"] < 20, row
    best = max(rows[1:], key=lambda row: row["readout-ball/dice"])
    record = json.loads((whole / "eval" / "best" / "best.json").read_text())
    assert record == {
        "measured": "readout-ball/dice", "value": best["readout-ball/dice"], "iteration": best["iteration"],
        "teacher": "teacher_checkpoint.pth",
    }  # fmt: skip
    kept, same = teacher(whole, "best"), teacher(whole, f"training_{best['iteration']}")
    assert all(torch.equal(value, same[name]) for name, value in kept.items())
    board = EventAccumulator(str(whole / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("eval/readout-ball/dice")] == [-1, 5, 11]
    assert len(board.Scalars("train/total_loss")) == 12
    said = [line for line in (whole / "log.txt").read_text().splitlines() if "evaluated " in line]
    assert len(said) == 3 and "evaluated after iteration 11: knn-grain/auc" in said[-1] and "% of the run so far" in said[-1]
    carried = torch.load(whole / "eval" / "best" / "teacher_checkpoint.pth", weights_only=True)["meta"]["config"]
    assert carried["evaluation"]["tasks"] == []  # weights carry no paths


def test_killed_after_a_row_and_before_its_checkpoint_no_row_is_lost_or_there_twice(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(cfg: object, checkpointer: object, iteration: int, total: int) -> bool:
        if iteration == 5:
            raise KeyboardInterrupt
        return iteration == 2

    given = words(data, tmp_path, "train.keep_best=readout-ball/dice", kinds={"readout": "ball"})
    for _ in range(2):  # the second time it goes on from iteration 3, and its row is the first one's again
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train3d, "is_checkpoint_due", killed)
            pretrain.main(given)
        assert [row["iteration"] for row in rows_of(tmp_path)] == [-1, 5]
    assert pretrain.main(given) == EXIT_OK
    assert rows_of(tmp_path) == [{k: row[k] for k in ("iteration", "readout-ball/dice")} for row in rows_of(whole)]
    assert (tmp_path / "eval/best/best.json").read_text() == (whole / "eval/best/best.json").read_text()
    train3d.set_aside(tmp_path)
    assert {path.name for path in (tmp_path / "previous_1").iterdir()} >= {"evaluation_metrics.json", "eval"}


class Stub:
    """An evaluator that says what it is told to."""

    name, metrics = "stub", {"score": True, "error": False}

    def __init__(self, said: list[float | Exception]) -> None:
        self.said = iter(said)

    def __call__(self, backbone: torch.nn.Module, alive: object) -> dict[str, float]:
        assert not backbone.training and backbone(torch.zeros(1, 1, 8, 8, 8)).shape == (1, 24)
        value = next(self.said)
        if isinstance(value, Exception):
            raise value
        return {"score": value, "error": -value}


@pytest.mark.parametrize("metric", ["score", "error"])
def test_the_best_is_the_first_of_the_best_also_over_a_resume(
    tmp_path: Path, small_config: SmallConfig, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = small_config(f"train.keep_best=stub/{metric}", "evaluation.tasks_period_iterations=1")
    model, runtime = SSLMetaArch(cfg), Runtime(torch.device("cpu"))
    for block in model.teacher.backbone.block_list:  # compiled for training's shapes: not called with others
        monkeypatch.setattr(block, "forward", pytest.fail)
    kept = []
    said = [9.0, 0.2, 0.5, math.nan, 0.4, BadInput("gone"), 0.5, 0.6, 0.1]
    for start in (0, 4):  # a second run goes on at the fourth
        evaluation = OnlineEvaluation([Stub(said[start : 4 if start == 0 else None])], cfg, runtime, tmp_path)
        with MetricWriter(tmp_path, start) as metrics:
            for iteration in range(start - 1, 3 if start == 0 else 8):
                assert evaluation.is_due(iteration, 100)
                evaluation.measure(iteration, model, metrics, {})
                if (tmp_path / "eval/best/best.json").exists():
                    kept.append(json.loads((tmp_path / "eval/best/best.json").read_text())["iteration"])
    assert kept == [0, 1, 1, 1, 1, 1, 6, 6]
    meta = torch.load(tmp_path / "eval/best/teacher_checkpoint.pth", weights_only=True)["meta"]
    assert meta["iteration"] == 6
    assert [row.get(f"stub/{metric}") is None for row in rows_of(tmp_path)] == [i in (3, 5) for i in range(9)]


def test_a_case_that_is_gone_ends_its_measurement_and_not_the_run(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, step = tmp_path / "data", train3d.train_step
    shutil.copytree(data, copy, ignore=shutil.ignore_patterns("cache"))

    def then_gone(*args: object) -> object:
        (copy / "label9.nii").unlink(missing_ok=True)
        shutil.rmtree(copy / "cache", ignore_errors=True)
        return step(*args)

    monkeypatch.setattr(train3d, "train_step", then_gone)
    given = words(copy, tmp_path / "out", "optim.epochs=1", kinds={"readout": "ball", "retrieval": "ball"})
    assert pretrain.main(given) == EXIT_OK
    assert "readout-ball was not measured after iteration 5: " in capfd.readouterr().err
    assert [list(row) for row in rows_of(tmp_path / "out")][1:] == [["iteration", "retrieval-ball/median_mm"]]


def one_class(folder: Path) -> None:
    path = folder / "grain_cls_datalist.json"
    content = json.loads(path.read_text())
    content["validation"] = [{**row, "label": 0} for row in content["validation"]]
    path.write_text(json.dumps(content))


def empty_part(folder: Path) -> None:
    path = folder / "ball_100_datalist.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "validation": []}))


def nothing_labelled(folder: Path) -> None:
    for i in range(6):
        nib.save(nib.Nifti1Image(np.zeros((26, 24, 22), np.uint8), np.eye(4)), folder / f"label{i}.nii")


MISTAKES = {
    "one class": (one_class, {"knn": "grain"}, [], ["knn of", "grain, validation: none of its 4 cases is grainy"]),
    "empty part": (empty_part, {"readout": "ball"}, [], ["readout of", "6 training, 0 validation"]),
    "missing list": (
        lambda folder: (folder / "ball_100_datalist.json").unlink(), {"retrieval": "ball"}, [], ["retrieval of", "ball_100"],
    ),
    "background alone": (nothing_labelled, {"readout": "ball"}, [], ["hold one label alone"]),
    "another task's list": (None, {"knn": "ball"}, [], ["knn of", "its recipe is for segmentation, this kind of task needs"]),
    "no recipe": (None, {"knn": "grian"}, [], ["knn of", "grian.yaml: no such recipe file"]),
    "unknown kind": (None, {"knm": "grain"}, [], ["kind='knm'", "did you mean 'knn'"]),
    "half a patch": (None, {"knn, size: 18": "grain"}, [], ["knn of", "size=18 is not a multiple of student.patch_size=4"]),
    "one name twice": (None, {"knn": "grain", "knn, size: 8": "grain"}, [], ["two tasks are called knn-grain"]),
    "best of no task": (None, {"knn": "grain"}, ["train.keep_best=knn/auc"], ["keep_best=knn/auc", "knn-grain/auc"]),
    "best of nothing": (None, {}, ["train.keep_best=a/b"], ["keep_best=a/b", "needs evaluation.tasks"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_training_starts(
    data: Path, tmp_path: Path, mistake: str, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, kinds, extra, said = MISTAKES[mistake]
    copy = data
    if spoil:
        copy = tmp_path / "data"
        shutil.copytree(data, copy, ignore=shutil.ignore_patterns("cache"))
        spoil(copy)
    assert pretrain.main(words(copy, tmp_path / "out", *extra, kinds=kinds)) == EXIT_BAD_INPUT
    errors = [line for line in capfd.readouterr().err.splitlines() if " E " in line or "Traceback" in line]
    assert len(errors) == 1 and all(word in errors[0] for word in said), errors
    path = tmp_path / "out" / "training_metrics.json"
    assert not path.exists() or not path.read_text()


def test_scans_that_are_trained_on_too_are_said_by_file_and_by_content(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(data / "image1.nii", tmp_path / "copy.nii")
    os.symlink(data / "image0.nii", tmp_path / "link.nii")
    listed = [Entry(str(tmp_path / name), ()) for name in ("copy.nii", "link.nii")] + [Entry(str(data / "image9.nii"), ())]
    pretraining = [Entry(str(data / f"image{i}.nii"), (26, 24, 22)) for i in range(3)]
    with caplog.at_level(logging.WARNING):
        warn_of_listed(listed, pretraining, "task")
        assert "task: 1 of its 3 scans are in the pretraining list too (link.nii, ...)" in caplog.text
        for entry in pretraining:
            entry.extra["sha"] = content_sha(entry)
        warn_of_listed(listed, pretraining, "task")
        assert "task: 2 of its 3 scans" in caplog.text and "copy.nii" in caplog.text
        caplog.clear()
        warn_of_listed(listed[2:], pretraining, "task")
        assert not caplog.text


def test_all_ways_to_start_a_training_hand_the_evaluators_in(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train3d.main(words(data, tmp_path, kinds={"knn": "grain"})) == EXIT_BAD_INPUT
    assert "call dinov2.run.train.pretrain.main" in capfd.readouterr().err
    monkeypatch.setattr(pretrain, "main", lambda *words: 7)
    with pytest.raises(SystemExit, match="7"), pytest.warns(RuntimeWarning, match="found in sys.modules"):
        runpy.run_module("dinov2.train.train3d", run_name="__main__")
    launched: list[str] = []
    monkeypatch.setattr(train, "launch", lambda module, *_: launched.append(module) or 0)
    assert train.main([]) == 0 and launched == ["dinov2.run.train.pretrain"]


def test_two_sharded_ranks_measure_the_same(data: Path, whole: Path, tmp_path: Path) -> None:
    keep = ["train.keep_best=knn-grain/auc", "train.strategy=fsdp", "train.batch_size_per_gpu=2"]
    given = words(data, tmp_path, *keep, "optim.epochs=1", kinds={"knn": "grain"})
    done = run_ranks(given, 2, "dinov2.run.train.pretrain")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    assert [row["iteration"] for row in rows] == [-1, 5]
    untrained = rows_of(whole)[0]  # of the same seed
    assert rows[0] == pytest.approx({name: untrained[name] for name in rows[0]}, abs=1e-6)
    record = json.loads((tmp_path / "eval/best/best.json").read_text())
    assert (record["iteration"], record["value"]) == (5, rows[1]["knn-grain/auc"])
    kept, same = teacher(tmp_path, "best"), teacher(tmp_path, "training_5")
    assert all(torch.equal(value, same[name]) for name, value in kept.items())


def wait_in_ranks(rank: int, port: int) -> None:
    """The main rank works for longer than a collective may wait; then it fails."""
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=1.5)
    )
    distributed.ALIVE_PERIOD_S = 0.1

    def work(alive: object) -> str:
        for _ in range(30):
            time.sleep(0.1)
            alive()
        return "done"

    assert while_others_wait(work) == "done"
    with pytest.raises(ZeroDivisionError if rank == 0 else LostRank):
        while_others_wait(lambda alive: 1 / 0)
    dist.destroy_process_group()


def test_ranks_wait_for_the_main_one_as_long_as_it_is_alive() -> None:
    in_ranks(wait_in_ranks, free_port())
