"""`segmentation3d.py` and `dinov2 predict` as a user runs them, on small generated volumes and on real ones."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dinov2.cli import main as dinov2
from dinov2.data.downstream.cases import Case
from dinov2.data.downstream.lists import write_downstream_datalist
from dinov2.data.downstream.recipes import Recipe
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_RESUMABLE
from dinov2.eval.segmentation3d import main
from dinov2.eval.segmentation_3d import engine, inference
from tests.conftest import ROOT, SMALL
from tests.started import Started, run_ranks

NETWORK = [w for w in SMALL if w.startswith("student.")] + [
    "student.depth=4", "student.embed_dim=32", "student.patch_size=8", "crops.global_crops_size=16",
    "crops.local_crops_size=8", "segmentation.decoder_channels=[12,8,6,4]", "segmentation.inplanes=4", "train.num_threads=1",
]  # fmt: skip
RECIPE = """task: segmentation
classes: {0: background, 1: left, 2: right}
space: {orientation: RAS}
train: {crop: pos_neg, crops_per_volume: 2, flip_p: 0.0, scale: 0.1, shift: 0.1, loss: dice_ce}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten volumes with a bright ball and a brighter one, stored with different orientations; one is smaller than a window."""
    folder = tmp_path_factory.mktemp("balls")
    rows = []
    for i in range(10):
        rng = np.random.default_rng(i)
        shape = (20, 24, 12) if i == 0 else (24, 26, 22)
        axes = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
        label = np.zeros(shape, np.uint8)
        for value, low in ((1, 4), (2, 13)):
            centre = np.array([low, rng.integers(7, 16), rng.integers(5, 7)])
            label[np.linalg.norm(axes - centre, axis=-1) < 4.5] = value
        image = rng.normal(0, 5, shape) + 60 * (label == 1) + 120 * (label == 2)
        affine = np.diag([-1.0 if i % 2 else 1.0, 1.0, 1.0, 1.0])
        for name, voxels in (("image", image.astype(np.float32)), ("label", label)):
            nib.save(nib.Nifti1Image(voxels[::-1] if i % 2 else voxels, affine), folder / f"{name}{i}.nii.gz")
        rows.append({kind: str(folder / f"{kind}{i}.nii.gz") for kind in ("image", "label")})
    parts = {"training": rows[:6], "validation": rows[6:8], "test": rows[8:]}
    write_downstream_datalist(folder / "balls_100_datalist.json", parts, seed=0)
    (folder / "balls.yaml").write_text(RECIPE)
    return folder


def words(data: Path, out: Path, head: str = "ViTAdapterUNETR", **flags: object) -> list[str]:
    given = {
        "pretrained-weights": "random", "output-dir": out, "dataset-name": data / "balls.yaml", "base-data-dir": data,
        "segmentation-head": head, "epochs": 2, "epoch-length": 6, "eval-iters": 4, "warmup-iters": 2, "image-size": 16,
        "batch-size": 2, "num-workers": 1, "learning-rate": 3e-3, "cache-dir": data / "cache",
    } | {k.replace("_", "-"): v for k, v in flags.items()}  # fmt: skip
    flat = [w for k, v in given.items() for w in (f"--{k}", str(v))]
    return [*flat, "--opts", *NETWORK]


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    text = capfd.readouterr().err
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if " E " in line][-1]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "best_model.pth", weights_only=True)["model"]


PROGRAM = "dinov2.eval.segmentation3d"


@pytest.mark.slow
def test_a_segmentation_learns_is_tested_and_predicts_on_the_files_own_grid(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov2.logging.progress.PERIOD_S", 0.0)  # a line for every step
    out = tmp_path / "run"
    assert main(words(data, out, epochs=20, eval_iters=40, learning_rate=1e-2)) == EXIT_OK
    results = json.loads((out / "results.json").read_text())
    assert results["iters_list"] == [39, 79, 119] and len(results["val_dice_list"]) == 3
    assert results["train_loss_list"][-1] < 0.8 * results["train_loss_list"][0]
    assert results["test"]["mean"]["dice"] > 0.6, results["test"]["mean"]
    assert results["test_dice"] == results["test"]["mean_with_background"]["dice"]
    rows = list(csv.DictReader((out / "per_case.csv").open()))
    assert [r["class"] for r in rows] == ["background", "left", "right"] * 2
    assert len(list((out / "worst").glob("*.png"))) == 4 and (out / "validation_case.png").exists()
    log = (out / "log.txt").read_text()
    for words_of in ("training cases prepared: 1 of 6", "iterations: 2 of 120", "iterations: 119 of 120", "cases: 1 of 2"):
        assert re.search(rf"dinov2.logging.progress: {words_of}, .* left", log), words_of
    for folder in (tmp_path, data):
        assert str(folder).encode() not in (out / "best_model.pth").read_bytes()
    image = nib.load(data / "image9.nii.gz")  # stored the other way round
    target = tmp_path / "prediction.nii.gz"
    command = ["predict", "--weights", str(out / "best_model.pth"), "--input", str(data / "image9.nii.gz")]
    assert dinov2([*command, "--output", str(target)]) == EXIT_OK
    assert "left" in capsys.readouterr().out
    predicted, truth = nib.load(target), np.asarray(nib.load(data / "label9.nii.gz").dataobj)
    assert predicted.shape == image.shape and np.array_equal(predicted.affine, image.affine)
    found = np.asarray(predicted.dataobj)
    for value, name in ((1, "left"), (2, "right")):
        dice = 2 * ((found == value) & (truth == value)).sum() / ((found == value).sum() + (truth == value).sum())
        row = next(r for r in rows if r["case"].startswith("image9") and r["class"] == name)
        assert dice == pytest.approx(float(row["dice"]), abs=1e-6)
    (tmp_path / "imagesTs").mkdir()
    shutil.copy(data / "image9.nii.gz", tmp_path / "imagesTs" / "nine_0000.nii.gz")
    command = ["predict", "--weights", str(out / "best_model.pth"), "--input", str(tmp_path / "imagesTs")]
    assert dinov2([*command, "--output", str(tmp_path / "labels")]) == EXIT_OK
    assert [p.name for p in (tmp_path / "labels").iterdir()] == ["nine.nii.gz"]
    assert np.array_equal(np.asarray(nib.load(tmp_path / "labels" / "nine.nii.gz").dataobj), found)


OUTPUTS = {
    "classes": "classes: {0: background, 1: left, 2: right, 3: nowhere}",
    "regions": "regions: {both: [1, 2], right: [2], nowhere: [3]}",
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_every_published_key_counts_as_monais_dice_metric_where_classes_are_absent(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of a part's two cases the first has no `right`, none has `nowhere`; predicted are both in the first, one in the other."""
    from monai.metrics import DiceMetric

    listed = json.loads((data / "balls_100_datalist.json").read_text())
    for part in ("training", "validation", "test"):
        files = [{kind: str(data / name) for kind, name in row.items()} for row in listed[part]]
        listed[part] = [{**row, "case": f"{part} {i}"} for i, row in enumerate(files)]
    for part in ("validation", "test"):
        source = nib.load(listed[part][0]["label"])
        listed[part][0]["label"] = str(tmp_path / f"{part}.nii.gz")
        without = np.asarray(source.dataobj) % 2  # 2 becomes background
        nib.save(nib.Nifti1Image(without.astype(np.uint8), source.affine), listed[part][0]["label"])
    (tmp_path / "balls_100_datalist.json").write_text(json.dumps(listed))
    (tmp_path / "balls.yaml").write_text(OUTPUTS[kind] + RECIPE[RECIPE.index("}") + 1 :])
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def predict(_: object, case: Case, recipe: Recipe, *rest: object) -> torch.Tensor:
        labels = torch.randint(0, 4, case.truth.shape, generator=torch.Generator().manual_seed(len(seen)))
        labels[(labels == 3) & (case.truth == 2).any()] = 0
        seen[case.name] = recipe.masks(labels), recipe.masks(case.truth)
        return seen[case.name][0]

    def monai(part: str, reduction: str) -> list[float]:
        metric = DiceMetric(include_background=True, reduction=reduction)
        for i in range(2):
            masks, truth = seen[f"{part} {i}"]
            assert truth.flatten(1).any(1)[-2:].tolist() == [i == 1, False]
            assert masks.flatten(1).any(1)[-2:].tolist() == [True, i == 0]
            metric(masks[None].float(), truth[None].float())
        return metric.aggregate().tolist()

    monkeypatch.setattr(inference, "predict_masks", predict)
    monkeypatch.setattr(engine, "predict_masks", lambda _, case, *rest: seen[case.name][0])  # of the pictures
    given = {"dataset_name": tmp_path / "balls.yaml", "base_data_dir": tmp_path, "cache_dir": tmp_path / "cache"}
    assert main(words(data, tmp_path / "out", "Linear", epochs=1, epoch_length=2, eval_iters=2, **given)) == EXIT_OK
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["val_dice_list"] == pytest.approx(monai("validation", "mean"))
    assert results["val_per_cls_dice_list"] == [pytest.approx(monai("validation", "mean_batch"))]
    assert [results["test_dice"]] == pytest.approx(monai("test", "mean"))
    assert results["test_per_cls_dice"] == pytest.approx(monai("test", "mean_batch"))
    ours = results["test"]["mean_with_background" if kind == "classes" else "mean"]["dice"]
    assert ours < results["test_dice"], "what is predicted and is not there costs by our rule"


@pytest.mark.slow
def test_killed_or_asked_to_stop_it_ends_as_an_undisturbed_run(data: Path, tmp_path: Path) -> None:
    """Bit for bit; once by SIGKILL after the first checkpoint, once by SIGTERM anywhere."""
    long = {"epochs": 4}
    assert main(words(data, tmp_path / "whole", **long)) == EXIT_OK
    out = tmp_path / "killed"
    process = Started(words(data, out, **long), PROGRAM)
    while process.poll() is None and not (out / "checkpoint.pth").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (out / "results.json").exists()
    process = Started(words(data, out, **long), PROGRAM)
    while process.poll() is None and len((out / "training_metrics.json").read_text().splitlines()) < 2:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    text, _ = process.communicate()
    assert process.returncode == EXIT_RESUMABLE, text
    assert main(words(data, out, **long)) == EXIT_OK
    a, b = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert (out / "per_case.csv").read_text() == (tmp_path / "whole" / "per_case.csv").read_text()
    assert main(words(data, out, **long)) == EXIT_OK, "finished already"


@pytest.mark.slow
def test_two_ranks_train_what_one_process_does(data: Path, tmp_path: Path) -> None:
    """The linear head, which has no BatchNorm; four cases a step, and the loss a mean over crops."""
    same = {"learning_rate": 1e-2, "num_workers": 0, "epochs": 1}
    assert main(words(data, tmp_path / "one", "Linear", batch_size=2, **same)) == EXIT_OK
    result = run_ranks(words(data, tmp_path / "two", "Linear", batch_size=1, **same), 2, module=PROGRAM)
    assert result.returncode == EXIT_OK, result.stderr
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((v - b[k]).abs().max()) for k, v in a.items() if v.is_floating_point()) < 1e-4


def test_what_cannot_be_used_is_said_in_one_line(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    cases = [
        ({"image_size": 20}, "--image-size 20 is no multiple of the patch size 8: use [16, 24]"),
        ({"pretrained_weights": tmp_path / "none.pth"}, "no such file"),
        ({"dataset_name": "BTVC"}, "BTVC: no such recipe file, and no dataset of that name (did you mean 'BTCV'?)"),
        ({"base_data_dir": tmp_path}, "balls_100_datalist.json"),
        ({"model_name": "SwinTransfer"}, "--model-name SwinTransfer: needs published self-supervised weights"),
        ({"learning_rate": 0}, "--learning-rate 0.0 must be positive"),
    ]
    for flags, message in cases:
        assert main(words(data, out, **flags)) == EXIT_BAD_INPUT
        assert message in one_line(capfd), message
    assert main(words(data, out, "Linear", epochs=1, epoch_length=1)) == EXIT_OK
    assert main(words(data, out, "Linear", epochs=1, epoch_length=2)) == EXIT_BAD_INPUT
    assert "holds a run with another epoch_length: use another --output-dir" in one_line(capfd)
    other = out / "best_model.pth"
    assert main([*words(data, tmp_path / "b", pretrained_weights=other), "student.embed_dim=48"]) == EXIT_BAD_INPUT
    assert "does not fit this network" in one_line(capfd)
    command = ["predict", "--weights", str(data / "balls.yaml"), "--input", str(data / "image1.nii.gz")]
    assert dinov2([*command, "--output", str(tmp_path / "p.nii.gz")]) == EXIT_BAD_INPUT
    assert "not a checkpoint of tensors" in one_line(capfd)
    command = ["predict", "--weights", str(other), "--input", str(data / "image1.nii.gz"), "--output", str(tmp_path / "p.png")]
    assert dinov2(command) == EXIT_BAD_INPUT
    assert "must end in .nii.gz" in one_line(capfd)


def test_a_wrong_label_value_stops_it_before_the_first_iteration(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "balls.yaml").write_text(RECIPE.replace(", 2: right", ""))
    given = words(data, tmp_path / "run", dataset_name=tmp_path / "balls.yaml", cache_dir=tmp_path / "cache")
    assert main(given) == EXIT_BAD_INPUT
    assert "2" in one_line(capfd) and not (tmp_path / "run" / "training_metrics.json").exists()


@pytest.mark.slow
@pytest.mark.data
def test_four_channels_of_real_brats_cases_train_and_predict_on_their_own_grid(local_data: Path, tmp_path: Path) -> None:
    """BRATS 2013 cases, of which two contrasts are there: each is used twice, here only."""
    rows = []
    for folder in sorted((local_data / "brats_format").glob("*/")):
        found = {kind: next(folder.glob(f"{kind}*")) for kind in ("Flair", "T1c", "OTMultiClass")}
        again = [shutil.copy(found[k], tmp_path / f"{folder.name}_{k}_again{found[k].name[-7:]}") for k in ("Flair", "T1c")]
        files = [found["Flair"], found["T1c"], *again]
        images = {f"image{c}": str(path) for c, path in enumerate(files, 1)}
        rows.append({**images, "label": str(found["OTMultiClass"]), "patient": folder.name})
    parts = {"training": rows[:2], "validation": rows[2:3], "test": rows[3:4]}
    write_downstream_datalist(tmp_path / "B_100_datalist.json", parts, seed=0)
    (tmp_path / "B.yaml").write_text("base: eval/datasets/BraTS\nregions: brats2013\nspace: {spacing_mm: [3, 3, 3]}\n")
    out = tmp_path / "run"
    given = {"dataset_name": tmp_path / "B.yaml", "base_data_dir": tmp_path, "cache_dir": tmp_path / "cache"}
    assert main(words(tmp_path, out, epochs=1, epoch_length=3, image_size=32, **given)) == EXIT_OK
    results = json.loads((out / "results.json").read_text())
    assert list(results["test"]["per_class"]) == ["TC", "WT", "ET"] and "mean_with_background" not in results["test"]
    files = [rows[3][f"image{c}"] for c in (1, 2, 3, 4)]
    target = tmp_path / "prediction.nii.gz"
    command = ["predict", "--weights", str(out / "best_model.pth"), "--output", str(target), "--overlap", "0.25"]
    assert dinov2([*command, "--input", *files]) == EXIT_OK
    source, predicted = nib.load(files[0]), nib.load(target)
    assert predicted.shape == source.shape and np.array_equal(predicted.affine, source.affine)
    assert nib.aff2axcodes(predicted.affine) == nib.aff2axcodes(source.affine)
    assert set(np.unique(np.asarray(predicted.dataobj))) <= {0, 1, 2, 3, 4}


@pytest.mark.slow
def test_the_published_command_line_runs_on_a_btcv_layout(tmp_path: Path) -> None:
    """All flags as published, fewer iterations and a small network."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(4):
        label = rng.integers(0, 14, (3, 3, 3)).repeat(8, 0).repeat(8, 1).repeat(8, 2).astype(np.uint8)
        image = (label * 20 - 150 + rng.normal(0, 5, label.shape)).astype(np.int16)
        for kind, voxels in (("img", image), ("label", label)):
            nib.save(nib.Nifti1Image(voxels, np.diag([1.5, 1.5, 2, 1])), tmp_path / f"{kind}{i:04d}.nii.gz")
        rows.append({"image": str(tmp_path / f"img{i:04d}.nii.gz"), "label": str(tmp_path / f"label{i:04d}.nii.gz")})
    parts = {"training": rows[:2], "validation": rows[2:3], "test": rows[3:]}
    write_downstream_datalist(tmp_path / "BTCV_100_datalist.json", parts, seed=0)
    flags = f"""--config-file pretrain/tiny_cpu --pretrained-weights random --output-dir {tmp_path}/out --dataset-name BTCV
        --dataset-percent 100 --base-data-dir {tmp_path} --segmentation-head ViTAdapterUNETR --epochs 1 --epoch-length 2
        --eval-iters 2 --warmup-iters 1 --image-size 16 --batch-size 2 --num-workers 1 --resize-scale 1.0 --learning-rate 1e-4
        --cache-dir {tmp_path}/cache --opts segmentation.decoder_channels=[12,8,6,4] segmentation.inplanes=4"""
    command = [sys.executable, "dinov2/eval/segmentation3d.py", *flags.split()]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == EXIT_OK, result.stderr
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["test_per_cls_dice"]) == 14
