"""A 3D network started from a 2D one (generated weights in DINOv2's layout) sees flat volumes as that one sees slices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.models.inflation import inflated, position_grid
from dinov2.models.vision_transformer import DinoVisionTransformer3d, vit_tiny_3d
from dinov2.models.weights import load_backbone
from dinov2.train.build import build
from tests.unit.models.test_foreign import dinov2_layout, drawn, plain_vit

SmallConfig = Callable[..., DictConfig]


def network(patch_size: int = 14, **changes: object) -> DinoVisionTransformer3d:
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 5 * patch_size, "interpolate_offset": 0.0}
    return vit_tiny_3d(patch_size=patch_size, init_values=1e-5, **{**sizes, **changes}).eval()


def started(state: dict[str, Tensor], how: str, **changes: object) -> DinoVisionTransformer3d:
    backbone = network(**changes)
    load_backbone(backbone, inflated(state, backbone, how, "w.pth"), "w.pth")
    return backbone


def coloured(image: Tensor) -> Tensor:
    """[H, W] in [-1, 1] as DINOv2 takes it, [1, 3, H, W]."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (((image + 1) / 2 - mean) / std)[None]


@pytest.mark.parametrize("how", ["central", "mean"])
@pytest.mark.parametrize("registers", [0, 4])
def test_a_volume_constant_along_depth_is_the_2d_networks_slice(how: str, registers: int) -> None:
    state = drawn(dinov2_layout(registers=registers))
    del state["mask_token"]  # not in every file
    backbone = started({f"teacher.backbone.{k}": v for k, v in state.items()}, how, num_register_tokens=registers)
    image = torch.rand(70, 70, generator=torch.Generator().manual_seed(1)) * 2 - 1
    volume = image[None, None, :, :, None].expand(1, 1, 70, 70, 28)
    tokens = F.conv2d(coloured(image), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    found = backbone.patch_embed(volume).unflatten(1, (5, 5, 2))  # [1, h, w, d, E]
    torch.testing.assert_close(found, tokens.movedim(1, -1)[:, :, :, None].expand_as(found), atol=1e-4, rtol=1e-4)
    out = backbone(volume[..., :14], is_training=True)  # one patch deep the whole networks are the same
    wanted = plain_vit(state, coloured(image), registers)
    torch.testing.assert_close(out["x_norm_patchtokens"], wanted[:, 1 + registers :], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out["x_norm_clstoken"], wanted[:, 0], atol=1e-4, rtol=1e-4)
    kernel = backbone.patch_embed.proj.weight[:, 0]  # [E, p, p, p]
    assert bool((kernel == kernel[..., :1]).all()) == (how == "mean")
    assert (kernel.abs().sum((0, 1, 2)) > 0).sum() == (1 if how == "central" else 14)


def test_enlarged_patches_are_seen_as_before_and_positions_are_resized_in_plane() -> None:
    state = drawn(dinov2_layout())
    image = torch.rand(70, 70, generator=torch.Generator().manual_seed(1)) * 2 - 1
    patches = image.unflatten(1, (5, 14)).unflatten(0, (5, 14)).permute(0, 2, 1, 3).flatten(0, 1)[:, None]
    larger = F.interpolate(patches, (16, 16), mode="bilinear")[:, 0].unflatten(0, (5, 5)).permute(0, 2, 1, 3).reshape(80, 80)
    backbone = started(state, "mean", patch_size=16, img_size=48)
    tokens = F.conv2d(coloured(image), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    found = backbone.patch_embed(larger[None, None, :, :, None].expand(1, 1, 80, 80, 16)).transpose(1, 2)
    torch.testing.assert_close(found, tokens.flatten(2), atol=1e-4, rtol=1e-4)

    plane = state["pos_embed"][:, 1:].unflatten(1, (5, 5)).movedim(-1, 1)
    plane = F.interpolate(plane, (3, 3), mode="bicubic", antialias=True).movedim(1, -1)  # [1, h, w, E]
    grid = backbone.pos_embed[:, 1:].unflatten(1, (3, 3, 3))
    torch.testing.assert_close(grid, plane[:, :, :, None].expand_as(grid))
    torch.testing.assert_close(backbone.pos_embed[:, 0], state["pos_embed"][:, 0])
    assert position_grid(state["pos_embed"], (5, 5, 2)).shape == (1, 51, 64)
    rotary = started(state, "mean", pos_encoding="rope")
    torch.testing.assert_close(rotary.cls_token[:, 0], state["cls_token"][:, 0] + state["pos_embed"][:, 0])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: {**s, "rope_embed.periods": torch.ones(4)}, "they are of DINOv3, not of a 2D ViT"),
        (lambda s: network().state_dict(), "they are of a 3D ViT.*inflation=mean is for 2D weights alone"),
        (lambda s: {"embeddings.patch_embeddings.projection.weight": torch.ones(64, 3, 14, 14)}, "layout of transformers"),
        (lambda s: drawn(dinov2_layout(embed_dim=128, depth=3)), "student.embed_dim 128 for 64, student.depth 3 for 2: set"),
        (lambda s: drawn(dinov2_layout(registers=4)), "student.num_register_tokens 4 for 0: set"),
        (lambda s: {k: v for k, v in s.items() if "gamma" not in k}, "student.layerscale null for 1e-5: set"),
        (lambda s: {**s, "blocks.0.mlp.w12.weight": torch.ones(1)}, "student.ffn_layer swiglu for mlp: set"),
        (lambda s: {**s, "patch_embed.proj.weight": torch.ones(64, 1, 14, 14)}, r"\(14, 14\) pixels of 1 channels"),
        (lambda s: {**s, "pos_embed": torch.ones(1, 25, 64)}, "25 positions: square ones of 3 channels"),
        (lambda s: {k: v for k, v in s.items() if k != "pos_embed"}, "a 2D network without pos_embed"),
        (lambda s: {k: v for k, v in s.items() if "qkv.bias" not in k}, "2 missing .blocks.0.attn.qkv.bias"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: Callable[[dict], dict], words: str) -> None:
    with pytest.raises(BadInput, match=f"weights w.pth.*{words}"):
        started(change(drawn(dinov2_layout())), "mean")


def test_the_start_goes_into_student_and_teacher(tmp_path: Path, small_config: SmallConfig) -> None:
    state = drawn(dinov2_layout(embed_dim=24))
    torch.save(state, tmp_path / "w.pth")
    start = [f"student.pretrained_weights={tmp_path / 'w.pth'}", "student.block_chunks=2"]
    with pytest.raises(BadInput, match="of a 2D network.*student.pretrained_weights_inflation=central starts a training"):
        build(small_config(*start), Runtime(torch.device("cpu")), load_start=True)
    cfg = small_config(*start, "student.pretrained_weights_inflation=central")
    model, _ = build(cfg, Runtime(torch.device("cpu")), load_start=True)
    for side in (model.student, model.teacher):
        torch.testing.assert_close(side["backbone"].block_list[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"])
        assert side["backbone"].patch_embed.proj.weight[..., [0, 1, 3]].abs().max() == 0
    for words in (["student.pretrained_weights_inflation=central"], [*start, "student.pretrained_weights_inflation=middle"]):
        with pytest.raises(BadInput, match="student.pretrained_weights_inflation"):
            small_config(*words)
