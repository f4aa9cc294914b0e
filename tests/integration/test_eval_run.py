"""What surrounds every evaluation: weights through one door and told first, the folder's identity, a new start."""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dinov2.checkpointer.checkpointer import Checkpointer
from dinov2.checkpointer.teacher import open_teacher
from dinov2.cli import main as dinov2
from dinov2.configs import default_yaml, load_and_merge_config_3d
from dinov2.data.downstream.cases import Cases
from dinov2.distributed.runtime import Runtime
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, BadInput
from dinov2.eval import run as evaluation
from dinov2.eval.metrics import classification as classification_metrics
from dinov2.eval.metrics.statistics import bootstrap_interval
from dinov2.eval.segmentation_3d import batches
from dinov2.train.build import build
from dinov2.train.state import TrainState, save_teacher
from tests.conftest import SMALL

NETWORK = [w for w in SMALL if w.startswith(("student.", "crops."))]
PROGRAMS = {
    "segmentation3d": ("balls", "--segmentation-head Linear --epochs 1 --epoch-length 2 --eval-iters 2 --warmup-iters 1"),
    "linear3d": ("halves", "--epochs 1 --epoch-length 4 --eval-period-iterations 4 --cached-views 1"),
    "knn": ("halves", ""),
    "log_regression": ("halves", ""),
    "regression": ("age", ""),
}
RECIPES = {
    "balls": "task: segmentation\nclasses: {0: background, 1: ball}\ntrain: {crop: pos_neg, crops_per_volume: 1}\n",
    "halves": "task: classification\nbins: {young: [0, 50], old: [50, 100]}\n",
    "age": "task: regression\n",
}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals, which take most of a small run's time, from few draws."""
    monkeypatch.setattr(classification_metrics, "bootstrap_interval", partial(bootstrap_interval, draws=20))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten balls of two grains; the label is a map, or a number."""
    folder = tmp_path_factory.mktemp("data")
    rows: dict[str, list[dict]] = {"_100": [], "_cls": []}
    for i in range(10):
        rng, age = np.random.default_rng(i), 20 + 7 * (i % 2) * 5 + i
        inside = np.linalg.norm(np.stack(np.meshgrid(*[np.linspace(-1, 1, 16)] * 3, indexing="ij"), -1), axis=-1) < 0.8
        image = inside * (100 + rng.normal(0, age / 2, inside.shape)) + rng.normal(0, 1, inside.shape)
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), folder / f"image{i}.nii.gz")
        nib.save(nib.Nifti1Image(inside.astype(np.uint8), np.eye(4)), folder / f"label{i}.nii.gz")
        rows["_100"].append({"image": f"image{i}.nii.gz", "label": f"label{i}.nii.gz"})
        rows["_cls"].append({"image": f"image{i}.nii.gz", "label": age})
    for name, recipe in RECIPES.items():
        kind = "_100" if name == "balls" else "_cls"
        parts = {"training": rows[kind][:6], "validation": rows[kind][6:8], "test": rows[kind][8:]}
        (folder / f"{name}{kind}_datalist.json").write_text(json.dumps({"shuffle_seed": 0, **parts}))
        (folder / f"{name}.yaml").write_text(recipe)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a training: configuration, a checkpoint's folder and the teacher of iteration 7."""
    out = tmp_path_factory.mktemp("training")
    cfg = load_and_merge_config_3d(None, SMALL)
    state = TrainState(*build(cfg, Runtime(torch.device("cpu"))))
    Checkpointer(out / "checkpoints", 9).save(state.state_dict(), 7)
    save_teacher(state.model, cfg, out / "eval" / "training_7", 7, {})
    (out / "config.yaml").write_text(default_yaml(cfg))
    return out


def start(program: str, data: Path, out: Path, weights: object, *extra: str, opts: list[str] | None = None) -> int:
    recipe, words = PROGRAMS[program]
    flags = {
        "pretrained-weights": weights, "output-dir": out, "dataset-name": data / f"{recipe}.yaml", "base-data-dir": data,
        "image-size": 16, "batch-size": 2, "num-workers": 0,
    }  # fmt: skip
    given = [*(w for k, v in flags.items() for w in (f"--{k}", str(v))), *words.split(), *extra]
    module = importlib.import_module(f"dinov2.eval.{program}")
    return module.main([*given, "--opts", "train.num_threads=1", *(opts or [])])


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    text = capfd.readouterr().err
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if " E " in line][-1]


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("source", ["demo", "checkpoint"])
def test_every_program_takes_every_source_and_the_weights_tell_their_network(
    data: Path, trained: Path, tmp_path: Path, program: str, source: str
) -> None:
    weights = "demo" if source == "demo" else trained / "checkpoints" / "0000007"
    assert start(program, data, tmp_path, weights, "--cache-dir", str(data / f"cache_{PROGRAMS[program][0]}")) == EXIT_OK
    kept = json.loads((tmp_path / "decisive.json").read_text())
    assert kept["pretrained_weights"] == open_teacher(weights).identity() and (tmp_path / "results.json").exists()
    assert f"embed_dim: {96 if source == 'demo' else 24}" in kept["config"]


def _code(path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple:
            return (Path.touch, (path.with_name("harmed"),))

    path.write_bytes(pickle.dumps({"teacher": Harm()}))


BAD_WEIGHTS: dict[str, tuple[Callable[[Path, Path], object], list[str], str]] = {
    "none.pth": (lambda path, good: None, [], "none.pth: no such file"),
    "text.pth": (lambda path, good: path.write_text("weights: none\n"), [], "not a checkpoint of tensors that is safe"),
    "short.pth": (
        lambda path, good: path.write_bytes(good.read_bytes()[:-500]),
        [],
        "not a checkpoint of tensors that is safe",
    ),
    "code.pth": (lambda path, good: _code(path), [], "not a checkpoint of tensors that is safe"),
    "lfs.pth": (lambda path, good: path.write_text("version https://git-lfs.github.com/spec/v1\n"), [], "a Git LFS pointer"),
    "a.rank_1.pth": (lambda path, good: shutil.copy(good, path), [], "one rank's share of an FSDP1 run"),
    "folder": (lambda path, good: path.mkdir(), [], "not a complete training checkpoint"),
    "good.pth": (lambda path, good: shutil.copy(good, path), ["student.depth=3"], "does not fit this network"),
    "heads.pth": (lambda path, good: shutil.copy(good, path), ["student.num_heads=1"], "trained with 2 heads a block"),
    "demo": (lambda path, good: None, ["student.patch_size=8"], "weights demo, backbone: does not fit this network"),
    "random": (lambda path, good: None, ["student.patch_size=6"], "is no multiple of the patch size 6: use [12, 18]"),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_cannot_be_used_are_told_before_a_case_is_read_or_a_file_written(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    program: str, name: str,
) -> None:  # fmt: skip
    make, opts, expected = BAD_WEIGHTS[name]
    path = tmp_path / name
    make(path, trained / "eval" / "training_7" / "teacher_checkpoint.pth")

    def read(*_: object) -> None:
        raise AssertionError("a case was read")

    monkeypatch.setattr(evaluation, "check_headers", read)
    monkeypatch.setattr(Cases, "__getitem__", read)
    words = {"demo": ["--config-file", "pretrain/demo_weights"], "random": []}.get(name, [])
    if name == "random":
        opts = [*NETWORK, "crops.global_crops_size=18", "crops.local_crops_size=12", *opts]
    weights = name if name in ("demo", "random") else path
    assert start(program, data, tmp_path / "out", weights, *words, opts=opts) == EXIT_BAD_INPUT
    assert expected in last_line(capfd)
    assert not (tmp_path / "out").exists() and not (tmp_path / "harmed").exists()


def test_a_probe_on_demo_weights_is_applied_from_any_folder_and_refuses_others(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained.parent)
    assert start("linear3d", data, tmp_path / "demo", "demo") == EXIT_OK
    assert start("linear3d", data, tmp_path / "own", trained.name) == EXIT_OK
    monkeypatch.chdir(tmp_path)
    words = ["--input", str(data / "image1.nii.gz")]
    assert dinov2(["classify", "--probe", "demo/probe.pth", *words]) == EXIT_OK
    assert dinov2(["classify", "--probe", "own/probe.pth", *words]) == EXIT_OK
    assert capfd.readouterr().out.count("(young ") == 2
    assert dinov2(["classify", "--probe", "own/probe.pth", *words, "--pretrained-weights", "demo"]) == EXIT_BAD_INPUT
    assert "demo: not the weights that own/probe.pth was made with" in last_line(capfd)


# ---------------------------------------------------------------------- the folder

FLAGS = "config_file pretrained_weights opts dataset_name dataset_percent image_size batch_size dataset_seed"
OWN_FLAGS = {
    "segmentation3d": "segmentation_head train_feature_model epochs epoch_length eval_iters warmup_iters resize_scale "
    "learning_rate model_name",
    "linear3d": "epochs epoch_length save_checkpoint_frequency eval_period_iterations learning_rates classifier_fpath "
    "model_name scale_learning_rates cached_views num_seeds fine_tune backbone_learning_rate",
    "knn": "nb_knn temperature",
    "log_regression": "",
    "regression": "",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_another_run_is_refused_and_no_resume_moves_it_aside(
    data: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], program: str
) -> None:
    out, weights = tmp_path / "out", trained / "eval" / "training_7" / "teacher_checkpoint.pth"
    assert start(program, data, out, weights) == EXIT_OK
    kept = json.loads((out / "decisive.json").read_text())
    # what runs of earlier versions have: a key more or less, and none of them could be continued
    assert sorted(kept) == sorted([*FLAGS.split(), *OWN_FLAGS[program].split(), "ranks", "config", "recipe", "datalist"])
    if program in ("segmentation3d", "linear3d"):
        assert start(program, data, out, weights) == EXIT_OK and "finished already" in capfd.readouterr().err
    before = (out / "results.json").read_text()
    assert start(program, data, out, weights, "--dataset-percent", "90") == EXIT_BAD_INPUT
    assert "holds a run with another dataset_percent: use another --output-dir, or --no-resume" in last_line(capfd)
    assert start(program, data, out, weights, "--dataset-percent", "90", "--no-resume") == EXIT_OK
    assert (out / "previous_1" / "results.json").read_text() == before
    assert json.loads((out / "previous_1" / "decisive.json").read_text()) == kept
    assert json.loads((out / "decisive.json").read_text())["dataset_percent"] == 90
    assert (out / "cache").is_dir() and (out / "log.txt").is_file()


@pytest.mark.parametrize("program", ["segmentation3d", "log_regression", "linear3d"])
def test_a_run_that_is_refused_for_a_case_leaves_its_folder_to_the_next(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], program: str
) -> None:
    folder, out = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
    image = nib.load(folder / "image7.nii.gz")  # of validation
    constant = nib.Nifti1Image(np.full(image.shape, 3, np.float32), image.affine)
    nib.save(constant, folder / "image7.nii.gz")
    assert start(program, folder, out, "random", opts=NETWORK) == EXIT_BAD_INPUT
    assert "image7" in last_line(capfd) and not (out / "decisive.json").exists()
    nib.save(image, folder / "image7.nii.gz")
    shutil.copy(data / "image7.nii.gz", folder / "image7.nii.gz")
    assert start(program, folder, out, "random", "--dataset-seed", "4", opts=NETWORK) == EXIT_OK


def test_a_run_that_was_killed_before_it_saved_anything_blocks_nobody(data: Path, tmp_path: Path) -> None:
    (tmp_path / "decisive.json").write_text(json.dumps({"config": "", "dataset_seed": 3}))
    assert start("knn", data, tmp_path, "random", opts=NETWORK) == EXIT_OK


@pytest.mark.parametrize("program", ["segmentation3d", "linear3d"])
def test_runs_of_versions_that_did_not_ask_the_weights_go_on(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], program: str
) -> None:
    """Their configuration is the published one with --opts, its comments were others, and it lacks a key of today."""
    weights, opts = trained / "eval" / "training_7" / "teacher_checkpoint.pth", [*NETWORK, "crops.global_crops_size=20"]
    silent = {**torch.load(weights, weights_only=True), "meta": {}}
    torch.save(silent, tmp_path / "teacher.pth")
    assert start(program, data, tmp_path / "out", tmp_path / "teacher.pth", opts=opts) == EXIT_OK
    kept = json.loads((tmp_path / "out" / "decisive.json").read_text())
    lines = [line.split("  #")[0] for line in kept["config"].splitlines() if "interpolate_offset" not in line]
    (tmp_path / "out" / "decisive.json").write_text(json.dumps({**kept, "config": "\n".join(lines)}))
    monkeypatch.setattr(evaluation, "config_of", lambda *_: load_and_merge_config_3d("pretrain/tiny_cpu"))
    assert start(program, data, tmp_path / "out", tmp_path / "teacher.pth", opts=opts) == EXIT_OK
    assert "finished already" in capfd.readouterr().err


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_default_that_changed_refuses_a_run_that_reads_it_and_says_how_to_continue(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], program: str
) -> None:
    """The run was begun with other values of the segmentation's keys, which no other evaluation reads."""
    assert start(program, data, tmp_path, "random", opts=NETWORK) == EXIT_OK
    kept = json.loads((tmp_path / "decisive.json").read_text())
    before = kept["config"]
    for name, value in (
        ("window_batch: 4", "window_batch: 3"),
        ("decoder_channels: [256, 128, 64, 32]", "decoder_channels: [8, 6, 4, 2]"),
    ):
        assert name in before
        before = before.replace(name, value)
    (tmp_path / "decisive.json").write_text(json.dumps({**kept, "config": before}))
    code = start(program, data, tmp_path, "random", opts=NETWORK)
    if program != "segmentation3d":
        assert code == EXIT_OK
        return
    assert code == EXIT_BAD_INPUT
    words = "segmentation.decoder_channels=[8,6,4,2] segmentation.window_batch=3"
    told = (
        f"holds a run with another config: add to --opts, to continue it: {words}; or use another --output-dir, or --no-resume"
    )
    assert told in last_line(capfd)
    assert start(program, data, tmp_path, "random", opts=[*NETWORK, *words.split()]) == EXIT_OK
    assert "finished already" in capfd.readouterr().err


def test_a_configuration_that_differs_is_named_and_one_of_removed_keys_too(tmp_path: Path) -> None:
    now = default_yaml(load_and_merge_config_3d(None, NETWORK))
    (tmp_path / "results.json").touch()
    for before in (default_yaml(), "student: {gone: 1}\n", "- 1\n"):
        (tmp_path / "decisive.json").write_text(json.dumps({"config": before}))
        with pytest.raises(BadInput, match="holds a run with another config: use another --output-dir"):
            evaluation._check_same_run({"config": now}, False, tmp_path, "classification")
    (tmp_path / "decisive.json").write_text(json.dumps({"config": now}))
    evaluation._check_same_run({"config": now}, False, tmp_path, "classification")


def test_ranks_that_see_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "gather_objects", lambda own: [own, {**own, "pretrained_weights": "other"}])
    with pytest.raises(BadInput, match="the ranks of this job see different weights or data"):
        evaluation._check_same_run({"pretrained_weights": "one"}, is_new=True, output_dir=tmp_path, task="")


def test_a_segmentation_begins_when_every_case_is_prepared(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = importlib.import_module("dinov2.eval.segmentation3d")
    seen = []

    def prepare_all(*given: object) -> None:
        seen.append((tmp_path / "decisive.json").exists())
        batches.prepare_all(*given)

    monkeypatch.setattr(program, "prepare_all", prepare_all)
    assert start("segmentation3d", data, tmp_path, "random", opts=NETWORK) == EXIT_OK
    assert seen == [False] * 3 and (tmp_path / "decisive.json").exists()


@pytest.mark.parametrize("program, name", [("segmentation3d", "best_model.pth"), ("linear3d", "results_eval_linear.json")])
def test_another_programs_results_are_left_as_they_are(
    data: Path, tmp_path: Path, program: str, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("theirs")
    for extra in ([], ["--no-resume"]):
        assert start(program, data, tmp_path, "demo", *extra) == EXIT_BAD_INPUT
        assert f"another program's run ({name}" in last_line(capfd)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "theirs"
