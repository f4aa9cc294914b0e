"""MONAI's Swin transformer as our encoder: its own pass, published weights by key, the contrastive head, refusals."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import SwinUNETR, swin_unetr
from torch import Tensor

from dinov2.checkpointer.teacher import open_teacher
from dinov2.configs import load_and_merge_config_3d
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.eval.methods.networks import config_of, open_network
from dinov2.eval.methods.registry import METHODS
from dinov2.eval.segmentation_3d.swin import SwinUNETR3d
from dinov2.models import Backbone
from dinov2.models.swin import SwinEncoder3d, load_swin, swin_width

EXTRA = ("norm.weight", "norm.bias", "rotation_head.weight", "rotation_head.bias", "conv.0.weight", "conv.0.bias")


def encoder(contrastive: bool = True, **more: Any) -> SwinEncoder3d:
    torch.manual_seed(1)
    return SwinEncoder3d(12, contrastive, **more).eval().requires_grad_(False)


def published(prefix: str = "module.") -> dict[str, Tensor]:
    """Tensors with the names of MONAI's pretraining; `module.` alone is the published file's layout."""
    torch.manual_seed(5)
    plain = {}
    for key, value in SwinEncoder3d(12, contrastive=True).state_dict().items():
        name = key.replace(".mlp.linear1.", ".mlp.fc1.").replace(".mlp.linear2.", ".mlp.fc2.")
        name = name.replace("swinViT.", prefix) if key.startswith("swinViT.") else f"module.{name}"
        plain[name] = torch.randn(value.shape) if value.is_floating_point() else value
    return plain | {f"module.{name}": torch.randn(3) for name in EXTRA}


def permuted(x: Tensor, pattern: str) -> Tensor:
    """What MONAI calls einops for."""
    before, after = (side.split() for side in pattern.split("->"))
    return x.permute([before.index(axis) for axis in after])


@pytest.mark.parametrize("window", [7, 4])
def test_the_pass_is_monais_own_and_so_is_the_network_on_one_channel(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swin_unetr, "rearrange", permuted)
    torch.manual_seed(0)
    theirs = SwinUNETR(1, 3, feature_size=12, window_size=window).eval().requires_grad_(False)
    ours = SwinUNETR3d(encoder(contrastive=False, window=window), 1, 3)
    names = {k.replace("swinViT.", "swinViT.encoder.swinViT."): v for k, v in theirs.state_dict().items()}
    ours.network.load_state_dict(names)
    x = torch.rand(1, 1, 32, 32, 64)  # windows of several sizes, and padded ones
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(("channels", "outputs", "numbers"), [(1, 14, 62_187_296), (4, 3, 65_334_933)])
def test_the_full_network_has_monais_numbers_and_gives_the_inputs_size(
    monkeypatch: pytest.MonkeyPatch, channels: int, outputs: int, numbers: int
) -> None:
    """62,187,296 is what MONAI's class has with 14 outputs; of four channels, five merging layers and a wider first block."""
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))  # MONAI reads its values
    with torch.device("meta"):
        net = SwinUNETR3d(SwinEncoder3d(48), channels, outputs)
        assert net(torch.empty(1, channels, 96, 96, 96)).shape == (1, outputs, 96, 96, 96)
        last = SwinEncoder3d(48, contrastive=True).contrastive_head
    assert sum(p.numel() for p in net.parameters()) == numbers
    assert tuple(last.weight.shape) == (512, 768)


def test_every_channel_passes_alone_and_is_merged_by_a_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    net = SwinUNETR3d(encoder(contrastive=False), 2, 3).eval().requires_grad_(False)
    x, seen = torch.rand(3, 2, 4, 5, 6), []

    def maps_of(each: Tensor, *_: object) -> list[Tensor]:
        """Maps that know their image: its number of the batch times channels, at every place."""
        seen.append(each)
        numbers = torch.arange(6.0)[:, None, None, None, None]
        return [numbers + torch.rand(1, 12 * 2**i, 2, 1, 3) for i in range(5)]

    monkeypatch.setattr(net.backbone, "forward", maps_of)
    torch.manual_seed(2)
    maps = net.network.swinViT(x)
    assert torch.equal(seen[0], x.reshape(6, 1, 4, 5, 6))
    torch.manual_seed(2)
    for merge, merged, alone in zip(net.network.swinViT.merges, maps, maps_of(x), strict=True):
        side_by_side = torch.cat([alone[0::2], alone[1::2]], 1).movedim(1, -1)
        expected = torch.nn.functional.gelu(merge.linear(side_by_side)).movedim(-1, 1)
        torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("prefix", ["module.", "module.swinViT.", "encoder.", "swin_vit."])
def test_published_weights_load_by_key_and_what_was_used_is_said(tmp_path: Path, prefix: str) -> None:
    saved = published(prefix)
    torch.save({"state_dict": saved, "epoch": 3}, tmp_path / "model_swinvit.pt")
    teacher = open_teacher(tmp_path / "model_swinvit.pt")
    assert swin_width(teacher.state, "w") == 12
    net = encoder()
    load_swin(net, teacher.state, "w")
    used = net.used
    assert used is not None
    assert sorted(used.taken + used.left) == sorted(saved) and used.left == sorted(f"module.{name}" for name in EXTRA)
    own = net.state_dict()
    assert torch.equal(
        own["swinViT.layers3.0.blocks.1.mlp.linear2.weight"], saved[f"{prefix}layers3.0.blocks.1.mlp.fc2.weight"]
    )
    assert torch.equal(own["contrastive_head.bias"], saved["module.contrastive_head.bias"])
    assert len(own) == len(used.taken)
    said = str(used)
    assert f"{len(own)} tensors used (patch_embed 2, layers1 " in said and "contrastive_head 2)" in said
    assert f"without a place here: {', '.join(used.left)}" in said


def test_the_feature_is_the_heads_output_at_the_mean_of_the_last_map(monkeypatch: pytest.MonkeyPatch) -> None:
    net = encoder()
    assert isinstance(net, Backbone) and (net.embed_dim, net.num_layers, net.patch_size) == (512, 1, 32)
    x = torch.rand(1, 1, 32, 32, 64)
    last = net(x)[-1]
    monkeypatch.setattr(net, "forward", lambda *_: [last])
    ((patches, cls),) = net.get_intermediate_layers(x, 1, return_class_token=True)
    assert last.shape == (1, 192, 1, 1, 2) and patches.shape == (1, 2, 512)
    torch.testing.assert_close(cls, net.contrastive_head(last.mean((2, 3, 4))))
    torch.testing.assert_close(cls, patches.mean(1), atol=1e-5, rtol=1e-4)
    (as_map,) = net.get_intermediate_layers(x, [0], reshape=True)
    torch.testing.assert_close(as_map.flatten(2).transpose(1, 2), patches)
    with pytest.raises(ValueError, match="its last stage alone"):
        net.get_intermediate_layers(x, 4)


def test_weights_of_intensities_from_0_to_1_see_them_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder for a feature, and the whole of SwinUNETR: the decoder reads the image too."""
    x, seen = torch.tensor([-1.0, 0.0, 1.0]).expand(1, 1, 3, 3, 3), []
    net = encoder(unit_range=True)
    monkeypatch.setattr(net, "forward", lambda image, *_: seen.append(image) or [torch.rand(1, 192, 1, 1, 1)])
    net.get_intermediate_layers(x)
    whole = SwinUNETR3d(net, 1, 3)
    monkeypatch.setattr(whole.network, "forward", seen.append)
    whole(x)
    assert [image[0, 0, 0, 0].tolist() for image in seen] == [[0.0, 0.5, 1.0]] * 2
    assert torch.equal(encoder().in_own_range(x), x)


def test_windows_are_as_configured_and_blocks_are_computed_again_in_the_backward_pass() -> None:
    cfg = load_and_merge_config_3d(
        None, ["segmentation.swin_width=12", "segmentation.checkpointing=true", "segmentation.swin_window=3"]
    )
    runtime = Runtime(torch.device("cpu"))
    net = open_network(METHODS["SwinRandom"], cfg, open_teacher("random"), "segmentation", 32, runtime)
    assert isinstance(net, SwinEncoder3d) and not net.unit_range and net.window == 3
    blocks = [m for m in net.modules() if isinstance(m, swin_unetr.SwinTransformerBlock)]
    assert len(blocks) == 8 and all(block.use_checkpoint and block.window_size == (3, 3, 3) for block in blocks)


def test_a_width_that_is_not_the_weights_own_is_refused_before_it_is_built(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "w.pt")
    teacher, runtime = open_teacher(tmp_path / "w.pt"), Runtime(torch.device("cpu"))
    method = METHODS["SwinTransfer"]
    assert config_of(method, teacher, None, []).segmentation.swin_width == 12, "as the weights tell"
    cfg = config_of(method, teacher, None, ["segmentation.swin_width=120000"])
    with pytest.raises(BadInput, match="of width 12, not segmentation.swin_width=120000: leave it out"):
        open_network(method, cfg, teacher, "classification", 32, runtime)


def without(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if part not in k}


INDEX = "module.layers1.0.blocks.0.attn.relative_position_index"
BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "a ViT": ({"cls_token": torch.zeros(1, 1, 8)}, "none of their 1 tensors is a 3D Swin transformer's"),
    "four channels": ({"patch_embed.proj.weight": torch.zeros(12, 4, 2, 2, 2)}, "on 4 channels of width 12"),
    "no head": (
        without(published(), "contrastive"),
        r"only in part: 2 missing \(contrastive_head.weight, contrastive_head.bias\)",
    ),
    "no last stage": (without(published(), "layers4"), r"only in part: 31 missing \(swinViT.layers4.0.blocks.0.norm1.weight, "),
    "another head": (
        published() | {"module.contrastive_head.weight": torch.zeros(512, 768)},
        r"1 of another shape \(module.contrastive_head.weight \(512, 768\) for \(512, 192\)\)",
    ),
    "other windows": (
        published() | {INDEX: torch.zeros(343, 343, dtype=torch.int64)},
        "of other attention windows than 7 cubed",
    ),
    "NaN": (published() | {"module.patch_embed.proj.bias": torch.full((12,), torch.nan)}, "1 tensors hold NaN or infinity"),
}


@pytest.mark.parametrize("name", BAD)
def test_weights_that_do_not_fit_whole_are_refused(name: str) -> None:
    state, message = BAD[name]
    with pytest.raises(BadInput, match=message):
        load_swin(encoder(), state, "w")
