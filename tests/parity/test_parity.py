"""Ours against the reference's numbers (README.md of this folder)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dinov2.configs import load_and_merge_config_3d
from dinov2.loss import TeacherCenter, dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from dinov2.models.vision_transformer import DinoVisionTransformer3d, resize_pos_embed
from dinov2.train.schedules import build_schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from fill import fill_, normal, value_for  # noqa: E402
from inputs import ssl_batch  # noqa: E402


def load(name: str) -> dict:
    return json.loads((HERE / name).read_text())


def close(ours: torch.Tensor, reference: object, atol: float) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(np.asarray(reference), dtype=ours.dtype), rtol=0, atol=atol)


@pytest.mark.parametrize("layout", ["chunked", "flat"])
def test_forward_equals_the_reference(layout: str) -> None:
    vectors = np.load(HERE / f"vit_forward_{layout}.npz")
    meta = json.loads(str(vectors["meta"]))
    keys = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "block_chunks", "init_values")
    net = fill_(DinoVisionTransformer3d(**{k: meta[k] for k in keys})).eval()
    for shape in meta["shapes"]:
        x = normal(f"{meta['tag']}/x/{shape}", shape)
        name = "x".join(map(str, shape))
        with torch.no_grad():
            plain = net(x, is_training=True)
            masks = normal(f"{meta['tag']}/mask/{shape}", plain["x_norm_patchtokens"].shape[:2]) > 0.3
            masked = net(x, masks, is_training=True)
            inter = net.get_intermediate_layers(x, 2, reshape=True, return_class_token=True)
            head = net(x)
        got = {
            "cls": plain["x_norm_clstoken"],
            "patch": plain["x_norm_patchtokens"],
            "masked_cls": masked["x_norm_clstoken"],
            "masked_patch": masked["x_norm_patchtokens"],
            "head": head,
        }
        for i, (patch, cls) in enumerate(inter):
            got |= {f"inter{i}_patch": patch, f"inter{i}_cls": cls}
        for key, value in got.items():
            close(value, vectors[f"{name}/{key}"], atol=1e-4)


@pytest.mark.parametrize("case", ["sinkhorn", "centering", "shared_head"])
def test_one_step_has_the_references_losses_and_gradients(case: str) -> None:
    ref = load(f"ssl_step_{case}.json")
    cfg = OmegaConf.merge(load_and_merge_config_3d("ssl3d_default_config"), ref["config"])
    model = SSLMetaArch(cfg)
    fill_(model.student)
    fill_(model.teacher, "t/")
    losses = model.forward_backward(ssl_batch(ref["tag"], **ref["batch"]), teacher_temp=ref["teacher_temp"])
    for name, value in ref["losses"].items():
        assert float(losses[name]) == pytest.approx(value, rel=1e-3), name
    norms = {n: float(p.grad.norm()) for n, p in model.student.named_parameters()}
    assert norms.keys() == ref["grad_norms"].keys()
    for name, value in ref["grad_norms"].items():
        assert norms[name] == pytest.approx(value, rel=1e-3), name
    for which in ("dino", "ibot"):
        if f"{which}_center_norm" in ref:
            center: TeacherCenter = getattr(model, f"{which}_center")
            center.apply_center_update()
            assert float(center.center.norm()) == pytest.approx(ref[f"{which}_center_norm"], rel=1e-3)


def vector(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return normal(f"loss/{name}", shape)


def test_losses_equal_the_reference() -> None:
    ref = load("losses.json")
    tight = {"rtol": 1e-5, "atol": 1e-6}

    def same(ours: torch.Tensor, key: str, field: str = "output") -> None:
        torch.testing.assert_close(ours, torch.tensor(ref[key][field]), **tight)

    same(sinkhorn_knopp(vector("teacher", (6, 64)), ref["sinkhorn"]["teacher_temp"]), "sinkhorn")
    same(sinkhorn_knopp(vector("teacher_patch", (11, 64)), ref["sinkhorn_ibot"]["teacher_temp"]), "sinkhorn_ibot")

    students = torch.stack([vector(f"student_{x}", (6, 64)) for x in "ab"])
    targets = torch.stack([torch.softmax(vector(f"target_{x}", (6, 64)) / 0.07, -1) for x in "ab"])
    same(dino_loss(students, targets), "dino")

    masks = torch.zeros(4, 8, dtype=torch.bool)
    masks[0, :5] = masks[2, 1:7] = True
    weight = (1 / masks.sum(-1).clamp(min=1))[:, None].expand_as(masks)[masks]
    target = torch.softmax(vector("target_patch", (11, 64)) / 0.07, -1)
    same(ibot_loss(vector("student_patch", (11, 64)), target, weight, 4)[0], "ibot")
    full_target = torch.softmax(vector("target_full", (4, 8, 64)) / 0.07, -1)
    same(ibot_loss(vector("student_full", (4, 8, 64))[masks], full_target[masks], weight, 4)[0], "ibot_full")

    same(koleo_loss(vector("koleo", (9, 32))), "koleo")

    center = TeacherCenter(64)
    center(vector("centre", (6, 64)), 0.05)
    same(center(vector("teacher", (6, 64)), ref["dino_centering"]["teacher_temp"]), "dino_centering")
    same(center.center[0], "dino_centering", "centre")


@pytest.mark.parametrize("stage, name", [("pretrain", "ssl3d_default_config"), ("highres", "train/vit3d_highres")])
def test_schedules_equal_the_reference(stage: str, name: str) -> None:
    ref = load("schedules.json")[stage]
    cfg = load_and_merge_config_3d(name)
    schedules = build_schedules(cfg, world_size=ref["global_batch"] // cfg.train.batch_size_per_gpu)
    assert schedules.total_iters == ref["total"]
    for key, values in ref["values"].items():
        schedule = getattr(schedules, {"momentum": "mom"}.get(key, key))
        assert [schedule(i) for i in ref["its"]] == pytest.approx(values, abs=1e-9, rel=0), key


def test_vit_large_has_the_published_names_shapes_and_groups() -> None:
    with torch.device("meta"):
        model = SSLMetaArch(load_and_merge_config_3d("ssl3d_default_config"))
    shapes = {k: list(v.shape) for k, v in model.student.state_dict().items()}
    assert shapes == load("state_dict_vit_large_3d.json")
    assert sum(p.numel() for p in model.student.parameters()) == 354_105_856
    groups = {
        name: [g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"]]
        for g in model.get_params_groups()
        for name in g["names"]
    }
    assert groups == load("param_groups_vit_large_3d.json")


def test_every_published_key_loads_with_its_default() -> None:
    ref = load("config_keys.json")
    for name, keys in (("ssl3d_default_config", ref["defaults"]), ("train/vit3d_highres", ref["train/vit3d_highres"])):
        cfg = load_and_merge_config_3d(name)
        for key, value in keys.items():
            assert OmegaConf.select(cfg, key, throw_on_missing=True) == value, key


def test_a_file_with_every_published_key_runs_unchanged(tmp_path: Path) -> None:
    ref = load("config_keys.json")
    tree = OmegaConf.create()
    for key, value in {**ref["defaults"], **ref["train/vit3d_highres"]}.items():
        OmegaConf.update(tree, key, value)
    OmegaConf.save(tree, tmp_path / "theirs.yaml")
    assert load_and_merge_config_3d(tmp_path / "theirs.yaml").crops.global_crops_size == 112


def test_positions_are_brought_to_the_high_resolution_grid_as_the_reference_does() -> None:
    ref = np.load(HERE / "highres_pos_embed.npz")["out"]
    ours = resize_pos_embed(value_for("highres/pos_embed", (1, 217, 40)), (6, 6, 6), (7, 7, 7))
    close(ours, ref, atol=1e-5)
