"""One door for weights: every source gives its tensors and what they say, and what is none is one line."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from dinov2 import load_encoder
from dinov2.checkpointer import teacher as teacher_module
from dinov2.checkpointer.checkpointer import Checkpointer
from dinov2.checkpointer.export import export
from dinov2.checkpointer.teacher import DEMO, names_weights, open_teacher, read_weights
from dinov2.cli import main
from dinov2.configs import default_yaml, load_and_merge_config_3d
from dinov2.data import write_datalist
from dinov2.data.corpus.overlap import seen_by_weights
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.features.setup import build_model_for_eval, config_for
from dinov2.models.hub import Fetched
from dinov2.train.build import build
from dinov2.train.state import TrainState, save_teacher

CPU = Runtime(torch.device("cpu"))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with checkpoints of iterations 3 and 11 and the teachers of 3 and 7; each has its own class token."""
    from tests.conftest import SMALL

    out = tmp_path_factory.mktemp("run")
    cfg = load_and_merge_config_3d(None, SMALL)
    state = TrainState(*build(cfg, CPU))
    checkpointer = Checkpointer(out / "checkpoints", 9)
    for iteration in (3, 7, 11):
        state.model.teacher["backbone"].cls_token.data.fill_(iteration)
        if iteration != 7:
            checkpointer.save(state.state_dict(), iteration)
        if iteration != 11:
            save_teacher(state.model, cfg, out / "eval" / f"training_{iteration}", iteration, {})
    (out / "config.yaml").write_text(default_yaml(cfg))
    return out


def cls_of(source: str | Path) -> float:
    return float(read_weights(source)["backbone.cls_token"].mean())


@pytest.mark.parametrize(
    "prefix",
    ["student.backbone.", "model.", "encoder.", "ema.", "model.teacher.backbone.", "net.teacher.", "module.ema_model."],
)
def test_one_prefix_that_makes_all_names_fit_is_taken_and_said(
    whole_run: Path, tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside it entries that are no part of the network, such as a trainer's."""
    caplog.set_level("INFO")
    teacher = open_teacher(whole_run / "eval" / "training_7")
    state = {k.removeprefix("backbone."): v for k, v in teacher.state.items() if k.startswith("backbone.")}
    torch.save({**{prefix + k: v for k, v in state.items()}, "steps": torch.zeros(1)}, tmp_path / "w.pth")
    loaded = build_model_for_eval(load_and_merge_config_3d(whole_run / "config.yaml"), tmp_path / "w.pth", CPU)
    assert float(loaded.cls_token.mean()) == 7
    assert "whose names begin with" in caplog.text


def test_heads_are_found_behind_the_prefix_too(whole_run: Path, tmp_path: Path) -> None:
    teacher = open_teacher(whole_run / "eval" / "training_7")
    torch.save({f"model.ema.{k}": v for k, v in teacher.state.items()}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").keys() == teacher.weights.keys()


def _several(path: Path) -> object:
    names = [f"{net}.{k}" for net in ("ema", "student") for k in ("cls_token", "patch_embed.proj.weight")]
    return torch.save({name: torch.zeros(1, 1, 8, 4, 4) for name in names}, path)


def _metas_2d(path: Path) -> object:
    shapes = {"cls_token": (1, 1, 384), "patch_embed.proj.weight": (384, 3, 14, 14), "norm.weight": (384,)}
    blocks = {f"blocks.{i}.norm1.weight": (384,) for i in range(12)}
    return torch.save({k: torch.zeros(shape) for k, shape in {**shapes, **blocks}.items()}, path)


def _objects(path: Path) -> object:
    return torch.save({"model": {"a": torch.zeros(1)}, "args": argparse.Namespace(lr=1), "best": np.float64(0.5)}, path)


@pytest.mark.parametrize(
    "write, words",
    [
        (_several, ["hold 2 networks (ema., student.)", "one of them"]),
        (_metas_2d, ["of a 2D network", "(14, 14) pixels", "3D"]),
        (_objects, ["argparse.Namespace", "numpy", "scalar", "save its tensors alone"]),
    ],
    ids=["several", "2D", "objects"],
)
def test_weights_of_another_kind_are_told_with_the_remedy(
    tmp_path: Path, write: Callable[[Path], object], words: list[str]
) -> None:
    write(tmp_path / "w.pth")
    for use in (lambda: read_weights(tmp_path / "w.pth"), lambda: load_encoder(tmp_path / "w.pth", "cpu")):
        with pytest.raises(BadInput) as caught:
            use()
        message = str(caught.value)
        assert not [w for w in [*words, "w.pth"] if w not in message], message
        assert message.isprintable()  # one line, no escape codes


def test_a_runs_folder_is_its_newest_teacher_or_checkpoint(whole_run: Path, tmp_path: Path) -> None:
    assert cls_of(whole_run) == 11 and open_teacher(whole_run).path == whole_run / "checkpoints" / "0000011"
    assert cls_of(whole_run / "eval" / "training_7") == 7
    assert cls_of(whole_run / "checkpoints" / "0000003") == 3
    copied = shutil.copytree(whole_run, tmp_path / "copy")
    shutil.rmtree(copied / "checkpoints" / "0000011")
    (copied / "checkpoints" / ".incomplete-0000020").mkdir()
    assert cls_of(copied) == 7
    shutil.rmtree(copied / "eval" / "training_7")
    assert open_teacher(copied).path == copied / "eval" / "training_3" / "teacher_checkpoint.pth"  # says more than 0000003
    assert load_encoder(whole_run, "cpu").embed_dim == 24, "the run's configuration tells the network"


def test_identity_is_of_the_content_and_the_reference_of_any_folder(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = whole_run / "eval" / "training_7" / "teacher_checkpoint.pth"
    assert open_teacher(file).identity() == hashlib.sha256(file.read_bytes()).hexdigest()
    first, second = (open_teacher(whole_run / "checkpoints" / name) for name in ("0000003", "0000011"))
    assert first.identity() != second.identity()
    moved = shutil.copytree(second.path, tmp_path / "moved")
    assert open_teacher(moved).identity() == second.identity() == open_teacher(whole_run).identity()
    assert [open_teacher(word).identity() for word in ("random", "vit_tiny_3d")] == ["random", "vit_tiny_3d"]
    assert open_teacher("demo").identity() == open_teacher(DEMO).identity(), "another demo is another network"
    monkeypatch.chdir(whole_run)
    references = {word: open_teacher(word).reference for word in ("demo", "random", "checkpoints/0000003", ".")}
    assert references == {
        "demo": "demo",
        "random": "random",
        "checkpoints/0000003": str(first.path),
        ".": str(second.path),
    }


def test_a_repository_is_a_source_with_its_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "fetch", lambda name, cache_dir: Fetched(DEMO, f"licence of {name}"))
    teacher = open_teacher("group/vit@v1")
    assert (teacher.path, teacher.licence, teacher.reference) == (DEMO, "licence of group/vit@v1", "group/vit@v1")


def test_an_untrained_network_is_told_by_a_configuration_or_its_name(small_config: Callable[..., DictConfig]) -> None:
    encoder = load_encoder("random", "cpu", config=small_config(), seed=3)
    assert encoder.embed_dim == 24 and encoder.licence is None
    wanted = build_model_for_eval(small_config(), "random", CPU, seed=3).state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in encoder.backbone.state_dict().items())
    with pytest.raises(BadInput, match="weights random: of which network.*vit_small_3d"):
        load_encoder("random", "cpu")
    assert config_for(open_teacher("vit_small_3d"), None, ["student.patch_size=8"]).student.arch == "vit_small_3d"
    assert config_for(open_teacher("random"), None) == load_and_merge_config_3d(), "the published defaults"
    for source in ("random", "vit_tiny_3d"):
        with pytest.raises(BadInput, match=f"weights {source}: an untrained network has none"):
            read_weights(source)


def test_weights_tell_their_network_overrides_come_last_and_a_file_counts_alone(whole_run: Path, tmp_path: Path) -> None:
    teacher = open_teacher(whole_run / "eval" / "training_7")
    told = config_for(teacher, None, ["segmentation.inplanes=4"])
    assert (told.student.embed_dim, told.student.num_heads, told.student.patch_size, told.segmentation.inplanes) == (
        24,
        2,
        4,
        4,
    )
    assert told.crops.global_crops_size == 16
    assert config_for(teacher, "train/vit3d_highres").student.arch == "vit_large_3d"
    torch.save({"teacher": teacher.state}, tmp_path / "silent.pth")
    silent = open_teacher(tmp_path / "silent.pth")
    with pytest.raises(BadInput, match="width 24 and 2 blocks are of no network known by name"):
        config_for(silent, None, ["segmentation.inplanes=4"])
    words = ["student.arch=vit_tiny_3d", "student.embed_dim=24"]
    assert config_for(silent, None, words) == load_and_merge_config_3d(None, words)


def test_a_configuration_that_contradicts_the_weights_is_refused_where_no_tensor_shows_it() -> None:
    trained_with = load_and_merge_config_3d("pretrain/demo_weights")
    assert load_encoder("demo", "cpu", config=trained_with).embed_dim == 96
    other = load_and_merge_config_3d("pretrain/demo_weights", ["student.num_heads=4"])
    with pytest.raises(BadInput, match="weights demo: does not fit this network: trained with 2 heads a block.* has 4"):
        load_encoder("demo", "cpu", config=other)
    with pytest.raises(BadInput, match="weights demo, backbone: does not fit this network"):
        load_encoder("demo", "cpu", config=load_and_merge_config_3d("pretrain/demo_weights", ["student.depth=3"]))


def _say(key: str, value: object) -> Callable[[dict], object]:
    def change(meta: dict) -> None:
        section, leaf = key.split(".")
        meta["config"][section][leaf] = value

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (_say("student.depth", 10**6), "say depth 1000000 of their network, and hold tensors of 2"),
        (_say("student.embed_dim", 10**7), "say embed_dim 10000000"),
        (_say("student.patch_size", 16), "say patch_size 16"),
        (_say("student.num_register_tokens", 10**9), "say num_register_tokens 1000000000"),
        (_say("crops.global_crops_size", 4 * 10**5), "say positions"),
        (_say("student.arch", "${oc.env:HOME}"), "[$]{oc.env:HOME}"),
        (lambda meta: meta.update(preprocessing=None), "preprocessing is None"),
        (lambda meta: meta.update(preprocessing=[1]), "preprocessing is .1."),
    ],
)
def test_what_weights_say_is_held_against_what_they_hold(
    whole_run: Path, tmp_path: Path, change: Callable[[dict], object], words: str
) -> None:
    content = torch.load(whole_run / "eval" / "training_7" / "teacher_checkpoint.pth", weights_only=True)
    change(content["meta"])
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(BadInput, match=words) as caught:
        load_encoder(tmp_path / "w.pth", "cpu")
    assert os.environ["HOME"] not in str(caught.value).replace(str(tmp_path), "")


def test_a_resolver_in_a_runs_configuration_is_text(whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "a password")
    copied = shutil.copytree(whole_run, tmp_path / "run")
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace('cache_dir: ""', 'cache_dir: "${oc.env:SECRET}"'))
    meta = open_teacher(copied / "checkpoints" / "0000003").meta
    assert "SECRET" in meta["config"]["train"]["cache_dir"] and "a password" not in str(meta)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(whole_run: Path, tmp_path: Path, value: float) -> None:
    content = torch.load(whole_run / "eval" / "training_7" / "teacher_checkpoint.pth", weights_only=True)
    content["teacher"]["backbone.blocks.1.mlp.fc1.bias"][3] = value
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(BadInput, match="w.pth, backbone: 1 tensors hold NaN or infinity .blocks.1.mlp.fc1.bias."):
        load_encoder(tmp_path / "w.pth", "cpu")


@pytest.mark.parametrize("form", ["w.pth", "w.safetensors", "demo"])
def test_no_flipped_bit_of_weights_is_taken_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """300 flips in what `export` writes and in the demo's file; what they change is said to be damaged."""
    small = {"teacher": {f"blocks.{i}.norm1.weight": torch.rand(30) for i in range(4)}, "meta": {"note": "a" * 200}}
    torch.save(small, tmp_path / "small.pth")
    target = tmp_path / ("demo.safetensors" if form == "demo" else form)
    if form == "demo":
        target.write_bytes(DEMO.read_bytes())
        monkeypatch.setattr(teacher_module, "DEMO", target)
    else:
        export(tmp_path / "small.pth", target, None, True)
    source = "demo" if form == "demo" else target
    whole, rng, accepted = open_teacher(source), random.Random(3), 0
    content = target.read_bytes()
    for _ in range(20 if form == "demo" else 300):
        bit = rng.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        target.write_bytes(flipped)
        try:
            found = open_teacher(source)
        except BadInput as err:
            assert "\n" not in str(err)
            continue
        accepted += 1  # in padding, or in a field that nothing reads
        assert found.meta == whole.meta and found.state.keys() == whole.state.keys()
        assert all(torch.equal(v, whole.state[k]) for k, v in found.state.items()), bit
    assert accepted < 200


def test_damaged_checkpoints_and_other_folders_are_one_line(whole_run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty: not a complete training checkpoint .no .metadata., and no run's output folder"):
        open_teacher(tmp_path / "empty")
    damages: list[Callable[[Path], object]] = [
        lambda folder: (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:100]),
        lambda folder: (folder / ".metadata").write_text("text"),
        lambda folder: [p.write_bytes(p.read_bytes()[:50]) for p in folder.glob("*.distcp")],
        lambda folder: [p.unlink() for p in folder.glob("*.distcp")],
    ]
    for i, damage in enumerate(damages):
        folder = shutil.copytree(whole_run / "checkpoints" / "0000003", tmp_path / str(i))
        damage(folder)
        with pytest.raises(BadInput, match=f"weights {folder}: damaged checkpoint") as caught:
            open_teacher(folder)
        assert "\n" not in str(caught.value)
    file = tmp_path / "short.pth"
    file.write_bytes((whole_run / "eval" / "training_3" / "teacher_checkpoint.pth").read_bytes()[:-200])
    with pytest.raises(BadInput, match="short.pth: not a checkpoint of tensors that is safe to open"):
        open_teacher(file)
    shutil.copy(whole_run / "eval" / "training_3" / "teacher_checkpoint.pth", tmp_path / "model_0000003.rank_2.pth")
    with pytest.raises(BadInput, match="one rank's share of an FSDP1 run"):
        open_teacher(tmp_path / "model_0000003.rank_2.pth")


def test_commands_take_the_same_sources(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, words in (("demo", "0.45 M"), (str(whole_run), "ibot_head")):
        assert main(["checkpoint", "inspect", source]) == 0
        assert words in capsys.readouterr().out
    assert main(["checkpoint", "export", "demo", str(tmp_path / "d.pth"), "--chunks", "2"]) == 0
    assert torch.equal(cls_tensor(tmp_path / "d.pth"), cls_tensor("demo"))
    assert main(["checkpoint", "inspect", "vit_tiny_3d"]) == 2 and "an untrained network has none" in capsys.readouterr().err
    sha = sorted(seen_by_weights("demo").scans)[0]
    scan = {"image": str(tmp_path / "a.nii"), "shape": [4, 4, 4], "spacing": [1, 1, 1], "sha": sha + "0" * 48}
    write_datalist(tmp_path / "list.json", [scan])
    assert main(["overlap", str(tmp_path / "list.json"), "demo"]) == 2
    assert "same scan: " + scan["image"] in capsys.readouterr().out


def cls_tensor(source: str | Path) -> torch.Tensor:
    return read_weights(source)["backbone.cls_token"]


def test_words_that_stand_for_weights_are_told_from_lists(whole_run: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(json.dumps([]))
    weights = ["demo", "w.pth", "folder/w.safetensors", "group/vit", "group/vit@v1:a.pth", whole_run]
    assert all(names_weights(word) for word in weights)
    assert not any(names_weights(word) for word in (tmp_path / "list", tmp_path / "none", "list"))
