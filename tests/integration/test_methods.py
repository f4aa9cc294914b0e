"""The methods of a comparison through the programs: trained, stopped, resumed, tested, predicted with; all small."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from dinov2.cli import main as dinov2
from dinov2.data.downstream.lists import write_downstream_datalist
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_RESUMABLE
from dinov2.eval import linear3d, segmentation3d
from dinov2.eval.methods.flags import complete
from dinov2.eval.segmentation_3d import engine
from tests.conftest import ROOT
from tests.started import run_ranks
from tests.unit.models.test_swin import published

EDGE = 32
SWIN_EDGES = [64, 32, 32]  # the smallest input that SwinUNETR can be trained on
BOXES = "task: segmentation\nclasses: {0: background, 1: box}\ntrain: {crops_per_volume: 1, flip_p: 0.5, rot90_p: 0.9}\n"
RECIPES = {
    "boxes": BOXES,
    "pairs": BOXES + "channels: 2\n",
    "kinds": "task: classification\nclasses: {0: low, 1: high}\n",
}
SMALL = ["segmentation.swin_width=12", "segmentation.unet_width=4", "segmentation.window_batch=1", "train.num_threads=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes with a bright box, of which every second one is larger; each is listed with one channel and with two."""
    folder = tmp_path_factory.mktemp("boxes")
    rows = []
    for i in range(8):
        rng = np.random.default_rng(i)
        label = np.zeros((EDGE, EDGE, EDGE - 8), np.uint8)
        size = 8 + 12 * (i % 2)
        label[4 : 4 + size, 6 : 6 + size, 2 : 2 + size] = 1
        voxels = {"image": (rng.normal(0, 5, label.shape) + 60 * label).astype(np.float32), "label": label}
        for kind, array in voxels.items():
            nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 1.5, 1.0])), folder / f"{kind}{i}.nii.gz")
        nib.save(nib.Nifti1Image(voxels["image"][::-1].copy(), np.diag([1.0, 1.0, 1.5, 1.0])), folder / f"other{i}.nii.gz")
        rows.append({kind: str(folder / f"{kind}{i}.nii.gz") for kind in ("image", "label")})
    pairs = [
        {"case": f"pair{i}", "image1": r["image"], "image2": str(folder / f"other{i}.nii.gz"), "label": r["label"]}
        for i, r in enumerate(rows)
    ]
    classes = [{"image": r["image"], "label": i % 2} for i, r in enumerate(rows)]
    lists = {"boxes_100": (rows, 2), "pairs_100": (pairs, 2), "kinds_cls": (classes, 2)}
    for name, (items, n) in lists.items():
        parts = {"training": items[:n], "validation": items[4:6], "test": items[6:]}
        if name != "kinds_cls":
            parts = {"training": items[:n], "validation": items[4:5], "test": items[7:]}
        write_downstream_datalist(folder / f"{name}_datalist.json", parts, seed=0)
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text)
    torch.save({"state_dict": published()}, folder / "model_swinvit.pt")
    return folder


def run(
    program: Any, data: Path, out: Path, dataset: str, method: str, *words: str, opts: Sequence[str] = SMALL, **flags: Any
) -> int:
    given = {
        "model-name": method, "output-dir": out, "dataset-name": data / f"{dataset}.yaml", "base-data-dir": data,
        "num-workers": 0, "cache-dir": data / "cache",
    } | {k.replace("_", "-"): v for k, v in flags.items()}  # fmt: skip
    return program.main([*(w for k, v in given.items() for w in (f"--{k}", str(v))), *words, "--opts", *opts])


def segment(data: Path, out: Path, dataset: str, method: str, *words: str, **flags: Any) -> int:
    length = {"epochs": 1, "epoch_length": 2, "eval_iters": 2, "warmup_iters": 1, "batch_size": 1, "learning_rate": 1e-3}
    return run(segmentation3d, data, out, dataset, method, *words, **(length | flags))


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    text = capfd.readouterr().err
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if " E " in line][-1]


def best(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "best_model.pth", weights_only=True)["model"]


def stop_after_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a scheduler would: the signal comes in the middle of the first iteration."""
    step = engine.step

    def stopped(*args: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(engine, "step", stopped)


def resumes(
    monkeypatch: pytest.MonkeyPatch, data: Path, folder: Path, dataset: str, method: str, *words: str, **flags: Any
) -> Path:
    """A run that is stopped and goes on ends as an undisturbed one, bit for bit; the folder of the second."""
    assert segment(data, folder / "whole", dataset, method, *words, **flags) == EXIT_OK
    with monkeypatch.context() as patched:
        stop_after_a_step(patched)
        assert segment(data, folder / "run", dataset, method, *words, **flags) == EXIT_RESUMABLE
    assert torch.load(folder / "run" / "checkpoint.pth", weights_only=True)["iteration"] == 0
    assert segment(data, folder / "run", dataset, method, *words, **flags) == EXIT_OK
    one, other = best(folder / "whole"), best(folder / "run")
    assert one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())
    assert (folder / "whole" / "per_case.csv").read_text() == (folder / "run" / "per_case.csv").read_text()
    assert segment(data, folder / "run", dataset, method, *words, **flags) == EXIT_OK, "finished already"
    return folder / "run"


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs a pass more."""
    monkeypatch.setattr(engine, "draw_worst", lambda *_: None)
    monkeypatch.setattr(engine, "predict_masks", lambda _, case, recipe, *window: recipe.masks(case.truth))


def in_small_windows(args: argparse.Namespace) -> argparse.Namespace:
    """As `complete`; a cube of 64 would take SwinUNETR eight times as long."""
    whole = vars(complete(args))
    return argparse.Namespace(**whole | ({"image_size": SWIN_EDGES} if whole["model_name"].startswith("Swin") else {}))


def main(argv: list[str]) -> int:
    """segmentation3d.py, as a process that starts this module runs it."""
    with pytest.MonkeyPatch.context() as patched:
        without_pictures.__wrapped__(patched)
        patched.setattr(segmentation3d, "complete", in_small_windows)
        return segmentation3d.main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SwinRandom", "UNet"])
def test_two_ranks_train_what_one_process_does(method: str, data: Path, tmp_path: Path) -> None:
    """Networks without an encoder of ours: a step of two crops, one a rank."""
    for ranks in (1, 2):
        words = (
            f"--model-name={method} --output-dir={tmp_path / str(ranks)} --dataset-name={data / 'boxes.yaml'} --epochs=1 "
            f"--base-data-dir={data} --num-workers=0 --cache-dir={data / 'cache'} --epoch-length=2 --eval-iters=2 "
            f"--warmup-iters=1 --batch-size={2 // ranks} --learning-rate=1e-3 --opts"
        ).split()
        result = run_ranks([*words, *SMALL], ranks, module=__name__)
        assert result.returncode == EXIT_OK, result.stderr
    one, two = best(tmp_path / "1"), best(tmp_path / "2")
    assert one.keys() == two.keys() and max(float((v.double() - two[k].double()).abs().max()) for k, v in one.items()) < 1e-4


def predict(out: Path, target: Path, *images: Path, words: tuple[str, ...] = ()) -> int:
    command = ["predict", "--weights", str(out / "best_model.pth"), "--input", *map(str, images), "--overlap", "0"]
    return dinov2([*command, "--output", str(target), *words])


def test_swin_transfer_trains_from_published_weights_resumes_and_predicts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = ("--pretrained-weights", str(data / "model_swinvit.pt"))
    with monkeypatch.context() as patched:
        patched.setattr(segmentation3d, "complete", in_small_windows)
        out = resumes(monkeypatch, data, tmp_path, "boxes", "SwinTransfer", *weights)
    log = (out / "log.txt").read_text()
    assert "tensors used (patch_embed 2, layers1 31" in log and "without a place here: module.contrastive_head.bias" in log
    kept = json.loads((out / "decisive.json").read_text())
    assert (kept["model_name"], kept["segmentation_head"], kept["image_size"]) == ("SwinTransfer", "SwinUNETR", SWIN_EDGES)
    results = json.loads((out / "results.json").read_text())
    assert results["parameters_trained"] == results["parameters"], "end to end"
    pretrained = torch.load(data / "model_swinvit.pt", weights_only=True)["state_dict"]
    name = "layers1.0.blocks.0.attn.qkv.weight"
    moved = (best(out)[f"network.swinViT.encoder.swinViT.{name}"] - pretrained[f"module.{name}"]).abs().max()
    assert 0 < float(moved) < 0.1
    assert predict(out, tmp_path / "p.nii.gz", data / "image7.nii.gz") == EXIT_OK
    found, truth = (np.asarray(nib.load(p).dataobj) for p in (tmp_path / "p.nii.gz", data / "label7.nii.gz"))
    assert found.shape == truth.shape
    dice = 2 * ((found == 1) & (truth == 1)).sum() / ((found == 1).sum() + (truth == 1).sum())
    row = next(r for r in csv.DictReader((out / "per_case.csv").open()) if r["class"] == "box")
    assert dice == pytest.approx(float(row["dice"]), abs=1e-6)
    wrong = data / "label0.nii.gz"
    assert segment(data, tmp_path / "no", "pairs", "SwinTransfer", "--pretrained-weights", str(wrong)) == EXIT_BAD_INPUT
    assert "not a checkpoint of tensors" in last_line(capfd) and not (tmp_path / "no").exists()
    for edge, message in (
        (40, "is no multiple of SwinUNETR's stride 32: use [32, 64]"),
        (32, "makes one voxel of"),
    ):
        assert segment(data, tmp_path / "no", "pairs", "SwinRandom", image_size=edge) == EXIT_BAD_INPUT
        assert f"--image-size {edge} {message}" in last_line(capfd)


def test_a_unet_is_planned_from_the_list_resumes_and_predicts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = resumes(monkeypatch, data, tmp_path, "boxes", "UNet")
    kept = json.loads((out / "decisive.json").read_text())
    assert kept["image_size"] == [32, 32, 24] and len(kept["unet_plan"]["strides"]) == 4
    assert kept["pretrained_weights"] == "random" and kept["segmentation_head"] == "DynUNet"
    assert best(out)["network.input_block.conv1.conv.weight"].shape == (4, 1, 3, 3, 3)
    assert predict(out, tmp_path / "p.nii.gz", data / "image7.nii.gz") == EXIT_OK
    assert nib.load(tmp_path / "p.nii.gz").shape == (32, 32, 24)
    assert segment(data, out, "boxes", "UNet", image_size=16) == EXIT_BAD_INPUT
    assert "holds a run with another image_size, unet_plan" in last_line(capfd)
    assert segment(data, tmp_path / "no", "boxes", "UNet", image_size=18) == EXIT_BAD_INPUT
    assert "--image-size 18 is no multiple of its U-Net's stride 4: use [16, 20]" in last_line(capfd)


def test_a_saved_network_that_says_what_it_is_not_is_refused(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert segment(data, tmp_path / "a", "boxes", "UNet", image_size=16, epoch_length=1) == EXIT_OK
    saved = torch.load(tmp_path / "a" / "best_model.pth", weights_only=True)
    changes = {
        "do not say what network": {"plan": {"strides": [[1, 1, 1]] * 50, "kernels": [[3, 3, 3]] * 50}},
        "another file's description": {"config": {**saved["meta"]["config"], "segmentation": {"unet_width": 4000}}},
        "none of their 0 tensors is a 3D Swin": {"method": "SwinRandom"},
        "no such method": {"method": "Nothing"},
        "neither an encoder nor a plan": {"plan": None},
        "where you trust its code": {"method": "os:system"},
    }
    for message, change in changes.items():
        torch.save({**saved, "meta": {**saved["meta"], **change}}, tmp_path / "a" / "best_model.pth")
        assert predict(tmp_path / "a", tmp_path / "p.nii.gz", data / "image7.nii.gz") == EXIT_BAD_INPUT
        assert message in last_line(capfd), message


VIT = [
    "student.arch=vit_tiny_3d", "student.embed_dim=32", "student.depth=4", "student.num_heads=2", "student.patch_size=8",
    "student.block_chunks=0", "crops.global_crops_size=32", "crops.local_crops_size=16", "train.num_threads=1",
    "segmentation.decoder_channels=[12,8,6,4]", "segmentation.inplanes=4",
]  # fmt: skip


def test_random_trains_all_of_a_vit_and_monai_vit_none_of_its_own(data: Path, tmp_path: Path) -> None:
    flags = {"image_size": EDGE, "epoch_length": 1, "opts": VIT}
    assert segment(data, tmp_path / "random", "boxes", "Random", **flags) == EXIT_OK
    results = json.loads((tmp_path / "random" / "results.json").read_text())
    assert results["parameters_trained"] == results["parameters"] - 32, "all but the mask token"
    state = {k.removeprefix("backbone."): v for k, v in best(tmp_path / "random").items() if k.startswith("backbone.")}
    torch.save({"teacher": state}, tmp_path / "teacher.pth")
    weights = ("--pretrained-weights", str(tmp_path / "teacher.pth"))
    assert segment(data, tmp_path / "frozen", "boxes", "MONAI-ViT", *weights, **flags) == EXIT_OK
    kept = json.loads((tmp_path / "frozen" / "decisive.json").read_text())
    assert kept["segmentation_head"] == "ViTAdapterUNETR" and not kept["train_feature_model"]
    saved = best(tmp_path / "frozen")
    assert all(torch.equal(saved[f"adapter.backbone.{k}"], v) for k, v in state.items())
    assert predict(tmp_path / "frozen", tmp_path / "p.nii.gz", data / "image7.nii.gz") == EXIT_OK


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The encoder of docs/methods.md, word for word, in the working folder."""
    lines = (ROOT / "docs" / "methods.md").read_text().splitlines()
    first = lines.index("    # monai_resnet.py")
    last = next(i for i in range(first, len(lines)) if lines[i].startswith("    dinov2 segment"))
    (tmp_path / "monai_resnet.py").write_text("\n".join(line[4:] for line in lines[first:last]) + "\n")
    monkeypatch.chdir(tmp_path)
    return "monai_resnet:encoder"


def test_the_encoder_of_the_docs_is_trained_around_probed_and_opened_where_it_is_named(
    data: Path, tmp_path: Path, example: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from monai.networks.nets import resnet10

    net = resnet10(spatial_dims=3, n_input_channels=1, feed_forward=False)
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "resnet.pth")
    weights = ("--pretrained-weights", str(tmp_path / "resnet.pth"))
    assert segment(data, tmp_path / "out", "pairs", example, *weights, image_size=EDGE, epoch_length=1) == EXIT_OK
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["parameters_trained"] == 2 * 512 * 512 + 512 + 512 * 2 + 2  # the Linear head's two layers
    frozen = best(tmp_path / "out")["backbone.net.layer1.0.conv1.weight"]
    assert torch.equal(frozen, net.state_dict()["layer1.0.conv1.weight"])
    images = [data / "image7.nii.gz", data / "other7.nii.gz"]
    assert predict(tmp_path / "out", tmp_path / "p.nii.gz", *images) == EXIT_BAD_INPUT
    assert f"around the encoder {example}: give --encoder {example} where you trust its code" in last_line(capfd)
    assert predict(tmp_path / "out", tmp_path / "p.nii.gz", *images, words=("--encoder", example)) == EXIT_OK
    adapter = ("--segmentation-head", "ViTAdapterUNETR")
    assert segment(data, tmp_path / "no", "boxes", example, *weights, *adapter, image_size=EDGE) == EXIT_BAD_INPUT
    assert "does not give its blocks" in last_line(capfd)
    assert segment(data, tmp_path / "no", "boxes", example, *weights, image_size=40) == EXIT_BAD_INPUT
    assert "--image-size 40 is no multiple of the patch size 16" in last_line(capfd)
    assert probe(data, tmp_path / "probe", example, *weights) == EXIT_OK
    command = ["classify", "--probe", str(tmp_path / "probe" / "probe.pth"), "--input", str(data / "image7.nii.gz")]
    assert dinov2(command) == EXIT_BAD_INPUT and "where you trust its code" in last_line(capfd)
    assert dinov2([*command, "--encoder", example]) == EXIT_OK and "high 0." in capfd.readouterr().out


OWN_VIT = """from dinov2.configs import load_and_merge_config_3d
from dinov2.models import build_backbone


def encoder(weights):
    cfg = load_and_merge_config_3d("pretrain/tiny_cpu", ["student.patch_size=8", "crops.global_crops_size=32"])
    found = build_backbone(cfg)
    if weights:
        found.load_state_dict(weights)
    return found
"""


def test_an_adapter_around_an_encoder_of_ones_own_is_that_around_ours(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has blocks; the same network and weights by either door end in the same tensors and the same label map."""
    (tmp_path / "own_vit.py").write_text(OWN_VIT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    net = importlib.import_module("own_vit").encoder({})
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    adapter = ("--pretrained-weights", str(tmp_path / "vit.pth"), "--segmentation-head", "ViTAdapterUNETR")
    small = [*SMALL, "segmentation.decoder_channels=[16,8,8,8]", "segmentation.inplanes=8"]
    ours = (*adapter, "--config-file", "pretrain/tiny_cpu")
    size = ["student.patch_size=8", "crops.global_crops_size=32"]
    assert segment(data, tmp_path / "own", "boxes", "own_vit:encoder", *adapter, opts=small) == EXIT_OK
    assert segment(data, tmp_path / "ours", "boxes", "3DINO", *ours, image_size=32, opts=[*small, *size]) == EXIT_OK
    own, other = ({k: v for k, v in best(tmp_path / name).items()} for name in ("own", "ours"))
    assert own.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in own.items())
    for name, words in (("own", ("--encoder", "own_vit:encoder")), ("ours", ())):
        assert predict(tmp_path / name, tmp_path / f"{name}.nii.gz", data / "image7.nii.gz", words=words) == EXIT_OK
    assert np.array_equal(*(np.asarray(nib.load(tmp_path / f"{name}.nii.gz").dataobj) for name in ("own", "ours")))


def probe(data: Path, out: Path, method: str, *words: str) -> int:
    length = {"epochs": 1, "epoch_length": 2, "eval_period_iterations": 2, "batch_size": 2, "cached_views": 1}
    return run(linear3d, data, out, "kinds", method, *words, **length, image_size=EDGE)


def test_swin_transfer_is_probed_at_its_contrastive_heads_output(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert probe(data, tmp_path / "out", "SwinTransfer", "--pretrained-weights", str(data / "model_swinvit.pt")) == EXIT_OK
    saved = torch.load(tmp_path / "out" / "probe.pth", weights_only=True)
    assert saved["weight"].shape == (2, 512) and saved["meta"]["method"] == "SwinTransfer"
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(found["validation"][-1]["auc_of_heads"]) == 13, "the 13 rates alone"
    capfd.readouterr()
    command = ["classify", "--probe", str(tmp_path / "out" / "probe.pth"), "--input", str(data / "image7.nii.gz")]
    assert dinov2(command) == EXIT_OK
    row = next(r for r in csv.DictReader((tmp_path / "out" / "predictions.csv").open()) if "image7" in r["case"])
    assert f"low {float(row['p_low']):.3f}, high {float(row['p_high']):.3f}" in capfd.readouterr().out
