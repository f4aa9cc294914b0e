"""A folder for transformers gives where this package is not installed what `load_encoder` gives here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from dinov2 import load_encoder
from dinov2.cli import main
from dinov2.errors import BadInput
from dinov2.models import build_backbone
from dinov2.sharing.licence import licence_to_share
from dinov2.sharing.transformers_folder import push, write_folder

SmallConfig = Callable[..., DictConfig]
NETWORKS = {  # every option that changes what is computed, in two networks
    "rope": [
        "student.pos_encoding=rope", "student.num_register_tokens=2", "student.ffn_layer=swiglufused",
        "student.layerscale=null", "student.qkv_bias=false", "student.block_chunks=2",
    ],
    "learned": ["student.pos_encoding=learned", "student.proj_bias=false", "student.ffn_bias=false", "student.layerscale=0.5"],
}  # fmt: skip
ELSEWHERE = """
import sys
sys.modules["dinov2"] = None  # an import of it fails
import numpy as np, torch
from transformers import AutoImageProcessor, AutoModel
folder, scan, out = sys.argv[1:]
found = {}
for name in ("rope", "learned"):
    processor = AutoImageProcessor.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    model, info = AutoModel.from_pretrained(f"{folder}/{name}", trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    voxels = np.load(f"{folder}/voxels.npy")
    batch = processor([[scan, scan]], return_affine=True)
    of_array = processor(voxels, spacing_mm=(3.0, 1.0, 1.0))["pixel_values"]
    assert torch.equal(of_array[:, 0], batch["pixel_values"][:, 0])
    unpadded = AutoImageProcessor.from_pretrained(f"{folder}/{name}", trust_remote_code=True, patch_size=1)
    unpadded = unpadded(voxels, spacing_mm=(3.0, 1.0, 1.0))["pixel_values"]
    assert unpadded.shape != of_array.shape
    assert torch.equal(processor(torch.from_numpy(voxels), spacing_mm=(3, 1, 1))["pixel_values"], of_array)
    with torch.no_grad():
        one, two = model.eval()(of_array, output_hidden_states=True), model(batch["pixel_values"])
        padded = model(unpadded)
    torch.testing.assert_close(padded.last_hidden_state, one.last_hidden_state)
    assert torch.equal(one.last_hidden_state[:, 0], one.pooler_output) and len(one.hidden_states) == 3
    torch.testing.assert_close(two.last_hidden_state, one.last_hidden_state)
    found[f"{name}_tokens"], found[f"{name}_affine"] = one.last_hidden_state.numpy(), batch["affine"].numpy()
    found[f"{name}_grid"] = np.array(model.patch_grid(of_array.shape[2:]))
np.savez(out, **found)
"""


def save_weights(cfg: DictConfig, path: Path, **meta: object) -> Path:
    """A teacher's file of a network in which every tensor matters."""
    backbone = build_backbone(cfg, teacher=True)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(0.0, 0.3)
    state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    said = {"config": OmegaConf.to_container(cfg), "iteration": 9, **meta}
    torch.save({"teacher": state, "meta": json.loads(json.dumps(said))}, path)
    return path


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """int16 with a slope, slices stored first, a plateau of padding far below, a margin of background."""
    rng = np.random.default_rng(4)
    stored = np.zeros((12, 27, 22), np.int16)
    stored[1:11, 3:25, 2:19] = rng.integers(300, 2000, (10, 22, 17))
    stored[:, :3, :3] = -30000
    image = nib.Nifti1Image(stored, np.array([[0, 0, 1, 5], [3, 0, 0, -8], [0, -1, 0, 9], [0, 0, 0, 1.0]]))
    image.header.set_slope_inter(0.37, 11.0)
    nib.save(image, tmp_path / "scan.nii.gz")
    np.save(tmp_path / "voxels.npy", np.asarray(nib.load(tmp_path / "scan.nii.gz").dataobj, dtype=np.float32))
    return tmp_path / "scan.nii.gz"


def test_transformers_gives_the_same_features_where_this_package_cannot_be_imported(
    scan: Path, tmp_path: Path, small_config: SmallConfig
) -> None:
    wanted = {}
    for name, words in NETWORKS.items():
        weights = save_weights(small_config(*words), tmp_path / f"{name}.pth", preprocessing={"percentiles": [1.0, 98.0]})
        wanted[name] = load_encoder(weights, "cpu", dtype="fp32")(scan)
        assert main(["checkpoint", "export", str(weights), "--hf", str(tmp_path / name), "--licence", "CC0-1.0"]) == 0
        again = load_encoder(tmp_path / name, "cpu", dtype="fp32")
        assert again.licence == "CC0-1.0" and again.percentiles == (1.0, 98.0)
        assert torch.equal(again(scan).patch, wanted[name].patch)
        assert not any(b"from dinov2" in f.read_bytes() for f in (tmp_path / name).glob("*.py"))
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    words = [sys.executable, "-c", ELSEWHERE, str(tmp_path), str(scan), str(tmp_path / "found.npz")]
    done = subprocess.run(words, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "found.npz")
    for name, features in wanted.items():
        tokens = torch.from_numpy(found[f"{name}_tokens"])
        torch.testing.assert_close(tokens[:, 0], features.cls, rtol=1e-4, atol=1e-5)
        num_patches = int(np.prod(found[f"{name}_grid"]))
        assert tokens.shape[1] == num_patches + (3 if name == "rope" else 1)
        patches = tokens[:, -num_patches:].unflatten(1, tuple(found[f"{name}_grid"]))
        torch.testing.assert_close(patches, features.patch, rtol=1e-4, atol=1e-5)
        to_centre = np.eye(4)
        to_centre[:3, :3] *= 4
        to_centre[:3, 3] = 1.5
        np.testing.assert_allclose(found[f"{name}_affine"][0] @ to_centre, features.affine, atol=1e-9)


def test_the_card_says_what_the_weights_say(tmp_path: Path, small_config: SmallConfig) -> None:
    seen = {"scans": ["a", "b", "c"], "patients": []}
    weights = save_weights(small_config(), tmp_path / "w.pth", licence="CC-BY-NC-4.0", trained_on=seen, datalist_sha256="ab12")
    write_folder(weights, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-nc-4.0\nlibrary_name: transformers\n")
    assert "3 scans" in card and "ab12" in card and "10 steps" in card and "Not a medical device" in card


def test_what_is_measured_of_weights_goes_along_from_card_to_card(tmp_path: Path) -> None:
    write_folder("demo", tmp_path / "one")
    card = (tmp_path / "one" / "README.md").read_text()
    assert "hippocampus labels from frozen patches" in card and card.count("Not a medical device") == 1 and "](../" not in card
    (tmp_path / "one" / "README.md").write_text(card + "\nMeasured here: 0.75.\n")
    write_folder(tmp_path / "one", tmp_path / "two")
    assert "\nMeasured here: 0.75.\n" in (tmp_path / "two" / "README.md").read_text()


@pytest.mark.parametrize("said", ["Apache-2.0", "MIT", "cc-by-4.0", "CC BY-NC-SA 4.0", "CC0-1.0", "GPL-3.0-or-later"])
def test_a_licence_that_allows_it_goes_along(said: str) -> None:
    assert licence_to_share(said, None, "w.pth") == said


@pytest.mark.parametrize(
    "said", [None, "cc-by-nc-nd-4.0", "CC BY-NC-ND 4.0", "the weights' owner decides; the code is Apache-2.0", "other"]
)
def test_a_licence_that_forbids_it_or_is_not_known_must_be_named(said: str | None) -> None:
    with pytest.raises(BadInput, match=r"w\.pth: .*licence.*--licence NAME"):
        licence_to_share(said, None, "w.pth")
    assert licence_to_share(said, "CC0-1.0", "w.pth") == "CC0-1.0"


def test_wrong_words_and_foreign_folders_are_refused_in_a_line(
    tmp_path: Path, small_config: SmallConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(save_weights(small_config(), tmp_path / "w.pth"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for words, said in (
        (["--hf", str(tmp_path / "mine"), "--licence", "MIT"], "holds other files"),
        (["--hf", str(tmp_path / "new")], "do not say their licence"),
        (["--hf", str(tmp_path / "new"), "--push", "nobody", "--licence", "MIT"], "owner/name"),
        ([str(tmp_path / "a.pth"), "--push", "a/b"], "--push a/b: is of the folder that --hf DIR writes"),
        ([], "give one of"),
        (["--hf", str(tmp_path / "new"), "--size", "16", "--licence", "MIT"], "--size: is of the volumes of --onnx FILE"),
        (["--hf", str(tmp_path / "new"), "--no-heads", "--licence", "MIT"], "--chunks, --no-heads: are of OUTPUT"),
        ([str(tmp_path / "a.pth"), "--hf", str(tmp_path / "new")], "give one of"),
    ):
        assert main(["checkpoint", "export", weights, *words]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_hub_that_cannot_be_reached_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match=r"--push a/b: the Hugging Face hub took nothing \(.+\): .* is complete"):
        push(tmp_path, "a/b", [])
