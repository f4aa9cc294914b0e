"""What users of 3DINO and DINOv2 import is here, and works as it is called there, or says in one line what takes its place."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dinov2.configs import default_yaml, load_and_merge_config_3d
from dinov2.data import DataAugmentationDINO3d, MaskingGenerator3d, SamplerType, collate_data_and_cast
from dinov2.data.augmentations import RandomResizedCrop3d
from dinov2.errors import BadInput
from dinov2.eval.linear3d import LinearClassifier
from dinov2.eval.probing.linear_heads import LinearHeads, head_grid
from dinov2.eval.segmentation_3d.adapter_modules import MSDeformAttn
from dinov2.eval.segmentation_3d.deformable import cell_centres
from dinov2.eval.segmentation_3d.segmentation_heads import ViTAdapterUNETRHead
from dinov2.eval.segmentation_3d.vit_adapter import ViTAdapter
from dinov2.eval.setup import build_model_for_eval, get_args_parser, get_autocast_dtype, setup_and_build_model_3d
from dinov2.eval.utils import ModelWithIntermediateLayers
from dinov2.features.features import class_features
from dinov2.layers import Attention, Block, DINOHead, MemEffAttention, NestedTensorBlock, PatchEmbed3d, Segment
from dinov2.logging import MetricLogger
from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from dinov2.models import build_model_from_cfg
from dinov2.models.vision_transformer import BlockChunk, DinoVisionTransformer3d, vit_large_3d
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.config import setup_3d
from dinov2.utils.param_groups import get_params_groups_with_decay
from dinov2.utils.utils import CosineScheduler, load_pretrained_weights
from tests.conftest import ROOT, SMALL
from tests.parity.fill import normal

PARITY = ROOT / "tests" / "parity"
NAMES = (PARITY / "import_names.txt").read_text().split()
SmallConfig = Callable[..., DictConfig]


def named(name: str) -> Any:
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", NAMES)
def test_a_published_name_is_where_its_users_import_it_from(name: str) -> None:
    assert callable(named(name))


def test_the_import_map_has_a_row_for_every_published_name() -> None:
    rows = [
        line.split("|")[1].strip() for line in (ROOT / "FIDELITY.md").read_text().splitlines() if line.startswith("| `dinov2.")
    ]
    assert len(NAMES) == 42 and {f"`{n}`" for n in NAMES} <= set(rows)
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize(
    "name, instead",
    [
        ("dinov2.data:make_data_loader", "dinov2.data.TrainLoader(cfg, datalist)"),
        ("dinov2.data:make_dataset_3d", "dinov2.data.read_datalist(path)"),
        ("dinov2.data:CropForegroundSwapSliceDims", "dinov2.data.preprocess.preprocess"),
        ("dinov2.data.transforms:make_classification_transform_3d", "configs/eval/datasets"),
        ("dinov2.data.loaders:make_segmentation_dataset_3d", "lists.read_downstream_datalist"),
        ("dinov2.eval.segmentation_3d.augmentations:make_transforms", "crops.training_crops"),
        ("dinov2.eval.vis_pca:get_pca_feat_vector", "dinov2.features.pca.fit_basis"),
        ("dinov2.eval.segmentation_3d.metrics:get_metric", "dinov2.eval.metrics.segmentation.score_case"),
        ("dinov2.fsdp:FSDPCheckpointer", "dinov2.fsdp.Checkpointer"),
    ],
)
def test_using_a_name_without_a_door_says_what_takes_its_place(name: str, instead: str) -> None:
    with pytest.raises(NotImplementedError) as raised:
        named(name)("anything", batch_size=2)
    line = str(raised.value)
    assert line.startswith(name.replace(":", ".")) and instead in line and "FIDELITY.md" in line and "\n" not in line
    assert named(name).__doc__ == line and named(name).__name__ == name.split(":")[1]


@pytest.mark.parametrize(
    "path",
    [
        "dinov2.data.TrainLoader", "dinov2.data.read_datalist", "dinov2.data.preprocess.preprocess",
        "dinov2.data.downstream.crops.training_cube", "dinov2.data.downstream.crops.central_cube",
        "dinov2.data.downstream.crops.training_crops", "dinov2.data.downstream.cases.Cases",
        "dinov2.data.downstream.recipes.load_recipe", "dinov2.data.downstream.lists.read_downstream_datalist",
        "dinov2.eval.metrics.segmentation.score_case", "dinov2.eval.metrics.segmentation.summarise",
        "dinov2.features.pca.fit_basis", "dinov2.fsdp.Checkpointer", "dinov2.train.state.TrainState",
    ],
)  # fmt: skip
def test_what_takes_a_names_place_is_there(path: str) -> None:
    assert callable(named(":".join(path.rsplit(".", 1))))


def test_packages_whose_doors_bring_torch_are_imported_without_it() -> None:
    code = "import sys, dinov2.data, dinov2.logging, dinov2.utils, dinov2.data.masking; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------- scripts begin


def command_line(tmp_path: Path, *opts: str, weights: str = "random") -> argparse.Namespace:
    words = ["--output-dir", str(tmp_path / "out"), "--pretrained-weights", weights, "--opts", *SMALL, *opts]
    return get_args_parser(description="a script").parse_args(words)


def test_the_parser_of_scripts_can_be_a_parent_of_theirs() -> None:
    parser = argparse.ArgumentParser(parents=[get_args_parser(add_help=False)])
    parser.add_argument("--cache-dir")
    args = parser.parse_args(["--config-file", "a.yaml", "--opts", "a=1", "b=2", "--cache-dir", "c"])
    assert (args.config_file, args.opts, args.cache_dir, args.output_dir) == ("a.yaml", ["a=1", "b=2"], "c", "")


def test_a_script_begins_with_its_configuration_scaled_written_and_seeded(tmp_path: Path) -> None:
    args = command_line(tmp_path, "optim.base_lr=0.02", "train.seed=5")
    cfg = setup_3d(args)
    drawn = torch.rand(1), np.random.rand(), random.random()
    assert cfg.optim.lr == 0.02 * math.sqrt(3 / 1024) and cfg.train.output_dir == str(tmp_path / "out")
    assert (tmp_path / "out" / "config.yaml").read_text() == default_yaml(cfg)
    assert load_and_merge_config_3d(tmp_path / "out" / "config.yaml") == cfg
    args.cache_dir = str(tmp_path / "cache")
    assert setup_3d(args).train.cache_dir == args.cache_dir
    assert drawn == (torch.rand(1), np.random.rand(), random.random())
    assert setup_3d(command_line(tmp_path, "optim.lr=0.5")).optim.lr == cfg.optim.lr, "always the rule's, as DINOv2's"


def test_a_script_does_not_write_over_another_programs_pretraining(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("of the script's last run")
    setup_3d(command_line(tmp_path))
    (tmp_path / "out" / "last_checkpoint.rank_0").write_text("model_0000009.rank_0.pth")
    (tmp_path / "out" / "config.yaml").write_text("theirs")
    with pytest.raises(BadInput, match="another program's run .last_checkpoint.rank_0"):
        setup_3d(command_line(tmp_path))
    assert (tmp_path / "out" / "config.yaml").read_text() == "theirs"


def test_a_script_gets_the_backbone_and_the_dtype_for_autocast(tmp_path: Path) -> None:
    model, dtype = setup_and_build_model_3d(command_line(tmp_path))
    assert not model.training and dtype == torch.float16
    x = torch.rand(2, 1, 16, 16, 16)
    cfg = load_and_merge_config_3d(None, SMALL)
    torch.testing.assert_close(model(x), build_model_for_eval(cfg, "random")(x))
    for name, wanted in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        word = f"compute_precision.teacher.backbone.mixed_precision.param_dtype={name}"
        assert get_autocast_dtype(load_and_merge_config_3d(None, [word])) == wanted


def test_build_model_from_cfg_gives_student_teacher_and_width(small_config: SmallConfig) -> None:
    student, teacher, width = build_model_from_cfg(small_config())
    only, same = build_model_from_cfg(small_config(), only_teacher=True)
    assert width == same == 24 and only.state_dict().keys() == student.state_dict().keys()
    assert [b.drop_path for b in student.block_list] == [0.2, 0.2] and [b.drop_path for b in teacher.block_list] == [0.0, 0.0]


def test_weights_load_by_key(tmp_path: Path, small_config: SmallConfig) -> None:
    ours, other, model = (build_model_from_cfg(small_config(), only_teacher=True)[0] for _ in range(3))
    x, path = torch.rand(2, 1, 16, 16, 16), tmp_path / "both.pth"
    saved = {key: {f"module.backbone.{k}": v for k, v in net.state_dict().items()} for key, net in
             (("teacher", ours), ("student", other))}  # fmt: skip
    torch.save(saved, path)
    for key, net in (("teacher", ours), ("student", other), (None, ours)):
        load_pretrained_weights(model, str(path), key)
        torch.testing.assert_close(model(x), net(x))
    with pytest.raises(BadInput, match=r"both.pth: no entry 'model' in it"):
        load_pretrained_weights(model, path, "model")


# ---------------------------------------------------------------- schedules, groups


def test_the_schedule_freezes_warms_up_and_follows_a_cosine() -> None:
    """DINOv2's definition: zeros, then a line that ends on the base value, then half a cosine over what is left."""
    schedule = CosineScheduler(
        base_value=2.0, final_value=0.5, total_iters=20, warmup_iters=4, start_warmup_value=1.0, freeze_iters=3
    )
    cosine = [0.5 + 0.5 * 1.5 * (1 + math.cos(math.pi * i / 13)) for i in range(13)]
    expected = [*[0.0] * 3, *np.linspace(1.0, 2.0, 4), *cosine]
    assert [schedule[i] for i in range(20)] == pytest.approx(expected, abs=1e-12) and schedule[20] == schedule[999] == 0.5
    schedule.schedule[:5] = 0  # how DINOv2 freezes the last layer
    assert schedule[4] == 0
    with pytest.raises(ValueError, match="warmup_iters=4 and freeze_iters=3 exceed total_iters=6"):
        CosineScheduler(2.0, 0.5, 6, 4, freeze_iters=3)


def test_schedules_equal_the_reference() -> None:
    ref = json.loads((PARITY / "schedules.json").read_text())["pretrain"]
    cfg = load_and_merge_config_3d("ssl3d_default_config")
    o, epoch = cfg.optim, cfg.train.OFFICIAL_EPOCH_LENGTH
    lr = o.base_lr * math.sqrt(ref["global_batch"] / 1024)
    schedules = {
        "lr": CosineScheduler(lr, o.min_lr, o.epochs * epoch, o.warmup_epochs * epoch, start_warmup_value=0),
        "wd": CosineScheduler(o.weight_decay, o.weight_decay_end, o.epochs * epoch),
    }
    for key, schedule in schedules.items():
        assert [schedule[i] for i in ref["its"]] == pytest.approx(ref["values"][key], abs=1e-9, rel=0), key


def test_parameter_groups_of_a_backbone_and_of_heads_equal_the_reference() -> None:
    reference = json.loads((PARITY / "param_groups_vit_large_3d.json").read_text())
    cfg = load_and_merge_config_3d("ssl3d_default_config")
    with torch.device("meta"):
        student = SSLMetaArch(cfg).student
    whole = {
        g["name"]: [g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"]]
        for g in get_params_groups_with_decay(student, cfg.optim.layerwise_decay, cfg.optim.patch_embed_lr_mult)
    }
    assert whole == reference
    for module, net in student.items():  # as DINOv2 does it, module by module
        net.requires_grad_(True)
        for g in get_params_groups_with_decay(net, lr_decay_rate=0.9, patch_embed_lr_mult=0.2):
            found = [g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"]]
            assert found == reference[f"{module}.{g['name']}"] and isinstance(g["params"], nn.Parameter)
    student.backbone.patch_embed.requires_grad_(False)
    names = {g["name"] for g in get_params_groups_with_decay(student.backbone)}
    assert "blocks.0.0.norm1.weight" in names and not any("patch_embed" in n for n in names)


# ---------------------------------------------------------------- losses


def vector(name: str, shape: tuple[int, ...]) -> Tensor:
    return normal(f"loss/{name}", shape)


@pytest.fixture(scope="module")
def reference() -> Callable[[Tensor, str], None]:
    numbers = json.loads((PARITY / "losses.json").read_text())

    def same(ours: Tensor, key: str, field: str = "output") -> None:
        torch.testing.assert_close(ours, torch.tensor(numbers[key][field]).view(ours.shape), rtol=1e-5, atol=1e-6)

    same.temp = lambda key: numbers[key]["teacher_temp"]  # type: ignore[attr-defined]
    return same


def test_the_image_loss_and_its_targets_equal_the_reference(reference: Any) -> None:
    loss = DINOLoss(64, student_temp=0.1, center_momentum=0.9)
    reference(loss.sinkhorn_knopp_teacher(vector("teacher", (6, 64)), reference.temp("sinkhorn")), "sinkhorn")
    students = [vector(f"student_{x}", (6, 64)) for x in "ab"]
    targets = [torch.softmax(vector(f"target_{x}", (6, 64)) / 0.07, -1) for x in "ab"]
    reference(loss(student_output_list=students, teacher_out_softmaxed_centered_list=targets), "dino")
    loss.update_center(vector("centre", (6, 64)))
    targets = loss.softmax_center_teacher(vector("teacher", (6, 64)), reference.temp("dino_centering"))
    reference(targets, "dino_centering")
    reference(loss.center[0], "dino_centering", "centre")
    again = loss.softmax_center_teacher(vector("teacher", (6, 64)), reference.temp("dino_centering"))
    assert torch.equal(again, targets)  # the centre moves with `update_center` alone
    warmer = DINOLoss(64, student_temp=0.2)([2 * s for s in students], targets[None])
    torch.testing.assert_close(warmer, loss(students, targets[None]))


def test_the_patch_loss_and_its_targets_equal_the_reference(reference: Any) -> None:
    loss = iBOTPatchLoss(64)
    teacher = vector("teacher_patch", (11, 64))
    found = loss.sinkhorn_knopp_teacher(teacher, reference.temp("sinkhorn_ibot"), n_masked_patches_tensor=torch.tensor([11]))
    reference(found, "sinkhorn_ibot")
    masks = torch.zeros(4, 8, dtype=torch.bool)
    masks[0, :5] = masks[2, 1:7] = True
    weight = (1 / masks.sum(-1).clamp(min=1))[:, None].expand_as(masks)[masks]
    scores, target = vector("student_patch", (11, 64)), torch.softmax(vector("target_patch", (11, 64)) / 0.07, -1)
    reference(loss.forward_masked(scores, target, student_masks_flat=masks), "ibot")
    padded = [torch.cat([x, torch.ones(3, 64)]) for x in (scores, target)]
    reference(loss.forward_masked(*padded, student_masks_flat=masks, n_masked_patches=11, masks_weight=weight), "ibot")
    full_target = torch.softmax(vector("target_full", (4, 8, 64)) / 0.07, -1)
    reference(loss(vector("student_full", (4, 8, 64)), full_target, masks), "ibot_full")
    loss.update_center(torch.stack([teacher, 3 * teacher]))
    targets = loss.softmax_center_teacher(teacher[None], 0.05)
    torch.testing.assert_close(targets[0], torch.softmax((teacher - 0.1 * 2 * teacher.mean(0)) / 0.05, -1))


def test_koleo_equals_the_reference(reference: Any) -> None:
    reference(KoLeoLoss()(vector("koleo", (9, 32))), "koleo")


# ---------------------------------------------------------------- layers and networks


def small_net(block_chunks: int = 0, depth: int = 4) -> DinoVisionTransformer3d:
    torch.manual_seed(1)
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": depth, "num_heads": 2, "block_chunks": block_chunks}
    return DinoVisionTransformer3d(**kwargs, init_values=0.5).eval()


def test_a_script_can_run_the_blocks_of_a_network_by_itself() -> None:
    for chunks, kind in ((0, Block), (2, BlockChunk)):
        net, x = small_net(chunks), torch.rand(2, 1, 16, 8, 12)
        tokens = net.prepare_tokens_with_masks(x)
        for part in net.blocks:
            assert isinstance(part, kind)
            tokens = part(tokens)
        torch.testing.assert_close(tokens, net(x, is_training=True)["x_prenorm"])
    block, tokens = net.block_list[0], torch.rand(2, 5, 32)
    flat = block.attn(tokens.flatten(0, 1), [Segment(2, 5)])
    torch.testing.assert_close(block.attn(tokens), flat.view(2, 5, 32))


def test_dinov2s_block_takes_a_tensor_or_a_list_and_has_dinov2s_defaults() -> None:
    make = partial(NestedTensorBlock, attn_class=MemEffAttention)
    block = make(
        dim=16, num_heads=2, mlp_ratio=2.0, qkv_bias=True, init_values=0.5, norm_layer=partial(nn.LayerNorm, eps=1e-6)
    ).eval()
    same = Block(16, 2, mlp_ratio=2.0, init_values=0.5).eval()
    same.load_state_dict(block.state_dict())
    a, b = torch.rand(2, 5, 16), torch.rand(3, 7, 16)
    together = block([a, b])
    for got, x in zip(together, (a, b), strict=True):
        torch.testing.assert_close(got, block(x))
        torch.testing.assert_close(got, same(x))
    plain = NestedTensorBlock(16, 2)
    assert plain.attn.qkv.bias is None and plain.norm1.eps == plain.norm2.eps == 1e-5 and isinstance(plain.ls1, nn.Identity)
    for other in ({"drop": 0.1}, {"attn_drop": 0.1}, {"act_layer": nn.ReLU}, {"attn_class": nn.Linear}):
        with pytest.raises(NotImplementedError, match="leave drop, attn_drop, act_layer and attn_class"):
            NestedTensorBlock(16, 2, **other)


def test_dinov2s_attention_takes_sequences() -> None:
    attention = MemEffAttention(16, num_heads=2)
    same = Attention(16, 2, qkv_bias=False)
    same.load_state_dict(attention.state_dict())
    x = torch.rand(3, 5, 16)
    torch.testing.assert_close(attention(x), same(x.flatten(0, 1), [Segment(3, 5)]).view(3, 5, 16))
    assert MemEffAttention(16).num_heads == 8
    with pytest.raises(NotImplementedError, match="segments"):
        attention(x, attn_bias=object())
    with pytest.raises(NotImplementedError, match="no dropout"):
        MemEffAttention(16, proj_drop=0.1)


def test_the_patch_embedding_has_dinov2s_arguments() -> None:
    embed = PatchEmbed3d(img_size=(16, 8, 8), patch_size=4, in_chans=2, embed_dim=6)
    assert embed.num_patches == 16 and embed.patches_resolution == (4, 2, 2)
    x = torch.rand(1, 2, 16, 8, 8)
    expected = embed.proj(x)  # [B, E, h, w, d]
    torch.testing.assert_close(embed(x), expected.flatten(2).transpose(1, 2))
    grid = PatchEmbed3d(16, 4, 2, 6, norm_layer=nn.LayerNorm, flatten_embedding=False)
    grid.proj.load_state_dict(embed.proj.state_dict())
    torch.testing.assert_close(grid(x), nn.functional.layer_norm(expected.movedim(1, -1), (6,)))
    assert named("dinov2.layers.patch_embed3d:PatchEmbed3d") is PatchEmbed3d


def test_the_head_has_dinov2s_arguments_in_their_order() -> None:
    head = DINOHead(6, 10, True, 3, 12, 5, False)
    assert [type(m) for m in head.mlp] == [nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Linear]
    assert head(torch.rand(4, 6)).shape == (4, 10) and not any("mlp.0.bias" in k for k in head.state_dict())
    assert head.last_layer.weight_v.shape == (10, 5)


def test_vit_large_is_built_by_dinov2s_keywords() -> None:
    with torch.device("meta"):
        net = vit_large_3d(patch_size=16, img_size=96, init_values=1e-5, ffn_layer="mlp", block_chunks=4, drop_path_rate=0.3)
    assert net.embed_dim == 1024 and [type(chunk) for chunk in net.blocks] == [BlockChunk] * 4


# ---------------------------------------------------------------- data


def test_crops_masks_and_batches_of_a_loader_of_ones_own() -> None:
    """DINOv2's chain: transform, masking generator, collation in torch's DataLoader."""
    augment = DataAugmentationDINO3d(local_crops_number=3, global_crops_size=16, local_crops_size=8)
    volumes = [torch.rand(1, 20, 18, 12, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    torch.manual_seed(0)
    random.seed(0)
    collate = partial(
        collate_data_and_cast,
        mask_ratio_tuple=(0.25, 0.75),
        mask_probability=0.5,
        dtype=torch.bfloat16,
        n_tokens=64,
        mask_generator=MaskingGenerator3d((4, 4, 4), max_num_patches=32),
    )
    samples = [(augment(v), None) for v in volumes]
    (batch,) = DataLoader(samples, batch_size=4, collate_fn=collate)
    assert batch.keys() == {
        "collated_global_crops", "collated_local_crops", "collated_masks", "mask_indices_list", "masks_weight", "upperbound",
        "n_masked_patches",
    }  # fmt: skip
    assert batch["collated_global_crops"].shape == (8, 1, 16, 16, 16) and batch["collated_global_crops"].dtype == torch.bfloat16
    assert batch["collated_local_crops"].shape == (12, 1, 8, 8, 8)
    for crop in range(2):  # crop-major
        for i in range(4):
            row = batch["collated_global_crops"][crop * 4 + i]
            assert torch.equal(row, samples[i][0]["global_crops"][crop].bfloat16())
    counts = batch["collated_masks"].sum(1).tolist()
    masked = sorted(n for n in counts if n)
    assert len(masked) == 4 and all(16 + 8 * i <= n <= 16 + 8 * (i + 1) for i, n in enumerate(masked))
    assert batch["upperbound"] == 24 + 32 + 40 + 48 and int(batch["n_masked_patches"]) == sum(counts)
    assert float(batch["masks_weight"].sum()) == pytest.approx(4)
    with pytest.raises(ValueError, match="needs n_tokens"):
        collate_data_and_cast(samples, (0.1, 0.5), 0.5, torch.float32)


def test_a_batch_trains_as_the_published_step_does(small_config: SmallConfig) -> None:
    cfg = small_config()
    augment = DataAugmentationDINO3d(local_crops_number=2, global_crops_size=16, local_crops_size=8)
    samples = [augment(torch.rand(1, 20, 18, 12)) for _ in range(2)]
    batch = collate_data_and_cast(samples, (0.1, 0.5), 0.5, torch.float32, n_tokens=64)
    losses = SSLMetaArch(cfg).forward_backward(batch, teacher_temp=0.05)
    assert torch.isfinite(losses["total_loss"])


def test_masks_of_a_generator_of_ones_own_are_taken() -> None:
    asked: list[int] = []

    def first_patches(num: int) -> np.ndarray:
        asked.append(num)
        return np.arange(64).reshape(4, 4, 4) < num

    crop = {"global_crops": [torch.zeros(1, 16, 16, 16)] * 2, "local_crops": []}
    batch = collate_data_and_cast([crop] * 3, (0.3, 0.6), 1.0, torch.float32, n_tokens=64, mask_generator=first_patches)
    assert len(asked) == 6 and min(asked) >= 19 and max(asked) <= 38
    assert [bool(row[n - 1]) and not bool(row[n:].any()) for row, n in zip(batch["collated_masks"], asked, strict=True)] == [
        True
    ] * 6
    assert len(batch["collated_local_crops"]) == 0


def test_masks_of_a_batch_follow_pythons_generator() -> None:
    crop = {"global_crops": [torch.zeros(1, 16, 16, 16)] * 2, "local_crops": []}
    random.seed(0)
    first, second = (collate_data_and_cast([crop], (0.3, 0.6), 1.0, torch.float32, n_tokens=64)["collated_masks"] for _ in "ab")
    random.seed(0)
    again = collate_data_and_cast([crop], (0.3, 0.6), 1.0, torch.float32, n_tokens=64)["collated_masks"]
    assert torch.equal(again, first) and not torch.equal(first, second)


def test_the_masking_generator_masks_as_many_patches_as_asked_anywhere() -> None:
    generator = MaskingGenerator3d(input_size=5)
    assert generator.get_shape() == (5, 5, 5) and generator().sum() == 0 and generator(125).all()
    random.seed(3)
    drawn = [generator(40) for _ in range(200)]
    assert all(m.shape == (5, 5, 5) and m.sum() == 40 for m in drawn)
    assert np.abs(np.mean(drawn, 0) - 40 / 125).max() < 0.15  # uniform, not in blocks
    random.seed(3)
    assert np.array_equal(generator(40), drawn[0])


def test_crops_without_a_seed_follow_torchs_generator() -> None:
    volume = torch.rand(1, 20, 18, 12)
    crop = RandomResizedCrop3d(8, in_slice_scale=(0.3, 0.6), cross_slice_scale=(0.2, 0.5))
    augment = DataAugmentationDINO3d(local_crops_number=1, global_crops_size=8, local_crops_size=8)
    for draw in (lambda: crop(volume), lambda: augment(volume)["global_crops"][0]):
        torch.manual_seed(0)
        first, second = draw(), draw()
        torch.manual_seed(0)
        assert torch.equal(draw(), first) and not torch.equal(first, second)


def test_a_random_crop_alone_is_that_of_the_augmentation() -> None:
    ramp = torch.arange(20.0)[:, None, None].expand(20, 18, 12)[None].contiguous()
    crop = RandomResizedCrop3d(8, (0.3, 0.6), (0.2, 0.5))(ramp, seed=1)
    assert crop.shape == (1, 8, 8, 8) and bool((crop.diff(dim=1) > 0).all())  # neither flipped nor turned
    share = float((crop[0, -1, 0, 0] - crop[0, 0, 0, 0]) / 7 * 8 / 20)  # of the first axis
    assert math.sqrt(0.3 * 0.9) - 0.05 < share < math.sqrt(0.6 / 0.9) + 0.05


def test_samplers_have_dinov2s_names() -> None:
    assert [s.name for s in SamplerType] == ["DISTRIBUTED", "EPOCH", "INFINITE", "SHARDED_INFINITE", "SHARDED_INFINITE_NEW"]


# ---------------------------------------------------------------- evaluations


def test_a_linear_classifier_on_intermediate_layers_is_one_of_the_probes_heads() -> None:
    net, x = small_net(), torch.rand(3, 1, 16, 16, 16)
    model = ModelWithIntermediateLayers(
        net.train(), n_last_blocks=4, autocast_ctx=partial(torch.autocast, "cpu", enabled=False)
    )
    tokens = model(x)
    assert not net.training and len(tokens) == 4 and tokens[0][0].shape == (3, 64, 32) and tokens[0][1].shape == (3, 32)
    heads = LinearHeads(head_grid([0.1], 4), 4, 32, num_classes=5, generator=torch.Generator().manual_seed(0))
    logits = heads.logits(class_features(net, x, 4))
    for i, head in enumerate(heads.heads):
        weight, bias = heads.head_weights(i)
        classifier = LinearClassifier(weight.shape[1], use_n_blocks=head.layers, use_avgpool=head.pooled, num_classes=5)
        classifier.linear.load_state_dict({"weight": weight, "bias": bias})
        torch.testing.assert_close(classifier(tokens), logits[:, i])
    half = ModelWithIntermediateLayers(net, 1, partial(torch.autocast, "cpu", dtype=torch.bfloat16))
    assert torch.equal(half(x)[0][1].float(), torch.autocast("cpu", dtype=torch.bfloat16)(net)(x).float())


def test_the_adapter_and_its_decoder_are_built_with_the_papers_widths() -> None:
    adapter = ViTAdapter(small_net()).eval()
    assert [tuple(f.shape) for f in adapter(torch.rand(1, 1, 16, 16, 16))] == [(1, 32, n, n, n) for n in (8, 4, 2, 1)]
    with torch.device("meta"):
        network = ViTAdapterUNETRHead(small_net(), num_channels=2, num_outputs=3)
    defaults = load_and_merge_config_3d().segmentation
    assert [block.up.out_channels for block in network.up_blocks] == list(defaults.decoder_channels)
    for key, value in adapter_options().items():
        assert value == defaults["drop_path_rate" if key == "drop_path" else key], key


def adapter_options() -> dict[str, Any]:
    from dinov2.eval.segmentation_3d.adapter import PAPER

    return PAPER._asdict()


def test_deformable_attention_takes_deformable_detrs_arguments() -> None:
    torch.manual_seed(0)
    attention = MSDeformAttn(d_model=32, n_levels=2, n_heads=8, n_points=4, ratio=0.5)
    for p in attention.parameters():
        nn.init.normal_(p, std=0.3)
    shapes = [(4, 3, 2), (2, 2, 2)]
    query, values, places = torch.rand(2, 8, 32), torch.rand(2, 32, 32), cell_centres([(2, 2, 2)])
    expected = super(MSDeformAttn, attention).forward(query, places, values, shapes)
    start = torch.tensor([0, 24])
    for points in (places[None, :, None], places[None, :, None].expand(2, -1, 2, -1)):
        torch.testing.assert_close(attention(query, points, values, torch.tensor(shapes), start, None), expected)
    moved = places[None, :, None].repeat(1, 1, 2, 1)
    moved[:, :, 1] += 0.2  # places of its own in each level
    assert not torch.allclose(attention(query, moved, values, shapes), expected)
    padding = torch.zeros(2, 32, dtype=torch.bool)
    torch.testing.assert_close(attention(query, moved, values, shapes, start, padding), attention(query, moved, values, shapes))
    padding[0, ::2] = True
    padded = attention(query, moved, values, shapes, start, padding)
    assert not torch.allclose(padded[0], attention(query, moved, values, shapes)[0])
    zeroed = attention.value_proj.register_forward_hook(lambda _m, _i, out: out * ~padding[..., None])
    torch.testing.assert_close(padded, attention(query, moved, values, shapes))  # as zero, whatever the projection's bias
    zeroed.remove()
    values = values.masked_fill(padding[..., None], 1e6)
    torch.testing.assert_close(attention(query, moved, values, shapes, start, padding), padded)
    with pytest.raises(NotImplementedError, match="n_heads=4"):
        MSDeformAttn(32, n_heads=4)


# ---------------------------------------------------------------- log


def test_the_metric_logger_writes_a_line_every_few_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    file = tmp_path / "metrics.json"
    metrics = MetricLogger(delimiter="  ", output_file=str(file))
    seen = []
    for item in metrics.log_every(iter("abcdefgh"), 2, "Training", n_iterations=8, start_iteration=3):
        metrics.update(loss=torch.tensor(float(len(seen))), lr=0.5)
        seen.append(item)
    assert seen == list("abcde")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["iteration"], r["loss"], r["lr"]) for r in rows] == [(4, 1.0, 0.5), (6, 3.0, 0.5), (7, 4.0, 0.5)]
    assert all(r["iter_time"] >= r["data_time"] >= 0 for r in rows)
    metrics.synchronize_between_processes()
    assert {k: m.global_avg for k, m in metrics.meters.items()} == {"loss": 2.0, "lr": 0.5}
    assert "Training [4/8] loss: 1.0000 (0.5000)  lr: 0.5000 (0.5000)" in caplog.text
    assert list(metrics.log_every([1, 2, 3], 10)) == [1, 2, 3]
