"""A teacher keeps its numbers through every form it can be written in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig

from dinov2.checkpointer.checkpointer import Checkpointer, _checksums
from dinov2.checkpointer.export import describe, export, renamed, without_paths
from dinov2.checkpointer.teacher import read_meta, read_teacher, read_weights
from dinov2.cli import main
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.models.weights import load_backbone
from dinov2.train.build import build
from dinov2.train.state import TrainState, save_teacher

SmallConfig = Callable[..., DictConfig]


@pytest.fixture
def run(tmp_path: Path, small_config: SmallConfig) -> tuple[TrainState, Path, Path]:
    """A state, its checkpoint folder and its teacher's file."""
    paths = ["train.dataset_path=/somewhere/list.json", "train.cache_dir=/somewhere/cache"]
    cfg = small_config("student.depth=4", "student.block_chunks=2", *paths)
    state = TrainState(*build(cfg, Runtime(torch.device("cpu"))))
    checkpointer = Checkpointer(tmp_path / "checkpoints", 1)
    checkpointer.save(state.state_dict(), 7)
    return state, checkpointer.path(7), save_teacher(state.model, cfg, tmp_path / "eval", 7, {"datalist_sha256": "abc"})


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_folder_file_and_safetensors_hold_the_same_teacher(run: tuple, tmp_path: Path) -> None:
    state, folder, file = run
    own = state.model.teacher.state_dict()
    assert export(file, tmp_path / "t.safetensors", None, True, licence="CC0-1.0") == len(own)
    meta = read_meta(tmp_path / "t.safetensors")
    assert meta["licence"] == "CC0-1.0"
    assert meta["config"] == read_meta(file)["config"] and not any(
        meta["config"]["train"][key] for key in ("dataset_path", "output_dir", "cache_dir")
    )
    assert b"somewhere" not in file.read_bytes() and "somewhere" not in str(meta)  # nor in the file that training writes
    earlier = {"config": {"train": {"dataset_path": "/somewhere/list.json", "seed": 1}}}  # as it once was written
    assert without_paths(earlier) == {"config": {"train": {"dataset_path": "", "seed": 1}}}
    for path in (folder, file, tmp_path / "t.safetensors"):
        assert equal(read_teacher(path)[0], own), path
    assert read_teacher(tmp_path / "t.safetensors")[1]["iteration"] == 7
    export(tmp_path / "t.safetensors", tmp_path / "back.pth", None, True)
    assert equal(read_teacher(tmp_path / "back.pth")[0], own)
    assert torch.load(tmp_path / "back.pth", weights_only=True)["meta"]["datalist_sha256"] == "abc"


def test_names_go_flat_and_back_and_heads_are_left_out(run: tuple, tmp_path: Path, small_config: SmallConfig) -> None:
    state, _, file = run
    own = state.model.teacher.state_dict()
    flat = renamed(own, 0)
    assert "backbone.blocks.3.norm1.weight" in flat and "backbone.blocks.1.3.norm1.weight" in own
    assert equal(renamed(flat, 2), own)
    with pytest.raises(BadInput, match="4 blocks cannot be put into 3"):
        renamed(own, 3)
    export(file, tmp_path / "bare.pth", 0, False)
    backbone = build(small_config("student.depth=4"), Runtime(torch.device("cpu")))[0].teacher["backbone"]
    load_backbone(backbone, read_weights(tmp_path / "bare.pth"), "bare")
    assert equal({f"backbone.{k}": v for k, v in backbone.state_dict().items()}, read_teacher(tmp_path / "bare.pth")[0])


def test_inspect_says_what_is_there(run: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder, file = run
    assert main(["checkpoint", "inspect", str(file)]) == 0
    text = capsys.readouterr().out
    assert "blocks: 4, chunked names" in text and "iteration: 7" in text and "dino_head" in text
    assert any("float32" in line for line in describe(folder))


@pytest.mark.parametrize(
    "name, words",
    [
        ("model_0012499.rank_3.pth", "one rank's share of an FSDP1 run"),
        ("text.pth", "not a checkpoint of tensors"),
        ("text.safetensors", "not a readable safetensors file"),
        ("folder", "not a complete training checkpoint"),
        ("none.pth", "no such file"),
    ],
)
def test_what_is_no_teacher_is_refused(tmp_path: Path, name: str, words: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name != "none.pth":
        path.write_text("hello")
    with pytest.raises(BadInput, match=words):
        read_teacher(path)
    assert main(["checkpoint", "export", str(path), str(tmp_path / "out.pth")]) == 2


def test_an_entry_of_a_teacher_that_is_no_tensor_is_refused_by_name(tmp_path: Path) -> None:
    backbone = {"cls_token": torch.zeros(1, 1, 4), "norm.weight": torch.ones(4)}
    for name, note in (("ours", {}), ("foreign", {"model.teacher.note": "a word"})):
        state = {**{f"model.teacher.backbone.{k}": v for k, v in backbone.items()}, "iteration": "7", **note}
        dcp.save(state, checkpoint_id=tmp_path / name)
        (tmp_path / name / "checksums.json").write_text(json.dumps(_checksums(tmp_path / name)))
    assert describe(tmp_path / "ours")[0].endswith("ours: 2 tensors, 0.00 M numbers")  # beside the teacher anything may be
    with pytest.raises(BadInput, match="foreign: its entry model.teacher.note is no tensor: use a checkpoint"):
        describe(tmp_path / "foreign")
    assert main(["checkpoint", "inspect", str(tmp_path / "foreign")]) == 2
