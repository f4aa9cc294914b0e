"""A bundle that MONAI runs gives the label map of `dinov2 predict`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, run, verify_net_in_out
from omegaconf import DictConfig

from dinov2.cli import main
from dinov2.data.downstream.recipes import Recipe, Space
from dinov2.errors import BadInput
from dinov2.eval.segmentation_3d.build import Task, build_head, save_segmentation
from dinov2.models import build_backbone
from dinov2.sharing.monai_bundle import write_bundle


@pytest.fixture
def weights(tmp_path: Path, small_config: Callable[..., DictConfig]) -> Path:
    """A segmentation of two channels into three classes, on a grid of its own, with weights that matter."""
    torch.manual_seed(0)
    cfg = small_config("student.pos_encoding=rope", "student.init=xavier")
    recipe = Recipe(
        channels=2, classes={0: "background", 1: "left", 2: "right"}, space=Space("RAS", [1.0, 1.0, 1.5]), name="balls"
    )
    task = Task(recipe, "Linear", 16, 1.0)
    model = build_head(build_backbone(cfg, teacher=True), cfg, task)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    save_segmentation(model, cfg, task, tmp_path / "seg" / "best_model.pth")
    return tmp_path / "seg" / "best_model.pth"


@pytest.fixture
def scans(tmp_path: Path) -> list[Path]:
    """Two channels, stored from right to left, of another spacing than the recipe's, fewer slices than a window."""
    rng, paths = np.random.default_rng(2), []
    for channel in range(2):
        smooth = np.kron(rng.normal(size=(6, 7, 2)), np.ones((4, 4, 4))).astype(np.float32)
        paths.append(tmp_path / f"scan{channel}.nii.gz")
        nib.save(
            nib.Nifti1Image(smooth, np.array([[-1.25, 0, 0, 9], [0, 1.0, 0, 3], [0, 0, 2.0, -7], [0, 0, 0, 1.0]])), paths[-1]
        )
    return paths


def test_monai_runs_the_bundle_to_the_label_map_of_predict(weights: Path, scans: list[Path], tmp_path: Path) -> None:
    wanted, found, bundle = tmp_path / "wanted.nii.gz", tmp_path / "found.nii.gz", tmp_path / "bundle"
    names = [str(scan) for scan in scans]
    assert main(["predict", "--weights", str(weights), "--input", *names, "--output", str(wanted), "--overlap", "0.5"]) == 0
    folder = str(weights.parent)
    assert main(["checkpoint", "export", folder, "--monai-bundle", str(bundle), "--licence", "CC-BY-4.0"]) == 0
    files = {"meta_file": str(bundle / "configs/metadata.json"), "config_file": str(bundle / "configs/inference.json")}
    run(**files, bundle_root=str(bundle), inputs=names, output=str(found), overlap=0.5, device="cpu")
    ours, theirs = nib.load(wanted), nib.load(found)
    assert np.array_equal(ours.dataobj, theirs.dataobj) and np.array_equal(ours.affine, theirs.affine)
    assert ours.header == theirs.header and set(np.unique(ours.dataobj)) == {0, 1, 2}
    verify_net_in_out("network_def", **files, device="cpu", bundle_root=str(bundle))
    parser = ConfigParser()
    parser.read_meta(files["meta_file"])
    shown = parser.get("_meta_#network_data_format#outputs#pred#channel_def")
    assert shown == {"0": "background", "1": "left", "2": "right"}
    assert str(tmp_path) not in "".join(f.read_text() for f in (bundle / "configs").iterdir())
    card = (bundle / "docs" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0") and "background, left, right" in card
    assert torch.load(bundle / "models" / "model.pt", weights_only=True)["meta"]["licence"] == "CC-BY-4.0"


def test_what_makes_no_bundle_is_said_in_a_line(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="do not say their licence: .*--licence NAME"):
        write_bundle(weights, tmp_path / "bundle")
    torch.save({"teacher": {"a": torch.zeros(1)}}, tmp_path / "teacher.pth")
    with pytest.raises(BadInput, match="not a segmentation network"):
        write_bundle(tmp_path / "teacher.pth", tmp_path / "bundle", "MIT")
    content = torch.load(weights, weights_only=True)
    torch.save({**content, "meta": {**content["meta"], "method": "theirs:encoder"}}, tmp_path / "theirs.pth")
    with pytest.raises(BadInput, match="around the encoder theirs:encoder, whose code is not this package's"):
        write_bundle(tmp_path / "theirs.pth", tmp_path / "bundle", "MIT")
    assert not (tmp_path / "bundle").exists()
    (tmp_path / "mine" / "configs").mkdir(parents=True)
    with pytest.raises(BadInput, match="holds other files"):
        write_bundle(weights, tmp_path / "mine", "MIT")
    (tmp_path / "mine" / "configs" / "metadata.json").write_text(json.dumps({}))  # of an earlier call
    assert "models/model.pt" in write_bundle(weights, tmp_path / "mine", "MIT")
