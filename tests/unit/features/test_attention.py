"""Attention rows are what softmax(QK^T) says, without the whole matrix; with windows too they sum to 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2 import Encoder
from dinov2.data.preprocess import to_16_bits
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.features.attention import scan_attention
from dinov2.features.scans import Scan
from dinov2.features.setup import build_model_for_eval
from dinov2.features.views import View
from dinov2.layers.rope import rotate
from dinov2.models.vision_transformer import DinoVisionTransformer3d

AFFINE = np.array([[0.0, 2.0, 0.0, -9.0], [0.8, 0.0, -1.8, 4.0], [0.6, 0.0, 2.4, 30.0], [0, 0, 0, 1]])  # oblique, uneven


def network(**changes: Any) -> DinoVisionTransformer3d:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "init": "xavier", **changes}
    return DinoVisionTransformer3d(**sizes).eval().requires_grad_(False)


def made_scan(shape: tuple[int, ...] = (1, 20, 12, 8), seed: int = 0) -> Scan:
    return Scan("made", to_16_bits(np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)), AFFINE)


@pytest.fixture
def encoder(small_config: Callable[..., DictConfig]) -> Encoder:
    cfg = small_config("student.pos_encoding=rope", "student.init=xavier")
    return Encoder(build_model_for_eval(cfg, "random", Runtime(torch.device("cpu"))))


@pytest.mark.parametrize("block", [0, 1, -1])
@pytest.mark.parametrize("changes", [{}, {"pos_encoding": "rope", "num_register_tokens": 2}])
def test_rows_are_the_softmax_of_queries_and_keys(changes: dict[str, Any], block: int) -> None:
    """In float64, from what the block's `qkv` gives in an ordinary pass."""
    net = network(**changes).double()
    x = torch.rand(2, 1, 12, 8, 20, dtype=torch.float64) * 2 - 1
    seen: list[torch.Tensor] = []
    net.block_list[block].attn.qkv.register_forward_hook(lambda *args: seen.append(args[2]))
    tokens = net.prepare_tokens_with_masks(x)
    net(x)
    q, k, _ = seen[0].view(2, -1, 3, 2, 12).permute(2, 0, 3, 1, 4)
    table = net.segment(x, tokens).rotary
    q, k = rotate(q, table), rotate(k, table)
    direct = torch.softmax(torch.einsum("bhqc,bhkc->bhqk", q, k) / 12**0.5, -1)
    rows = net.get_self_attention(x, block)
    assert rows.dtype == torch.float64
    torch.testing.assert_close(rows, direct, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(net.get_self_attention(x, block, [0, 7]), direct[:, :, [0, 7]], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]), rtol=1e-12, atol=0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else [out]:
            self.numel = max(self.numel, item.numel() if isinstance(item, torch.Tensor) else 0)
        return out


def test_a_row_takes_no_memory_of_the_whole_matrix() -> None:
    net = network()
    with torch.no_grad(), Largest() as largest:
        rows = net.get_self_attention(torch.rand(1, 1, 40, 40, 40), queries=[0])
    assert rows.shape == (1, 2, 1, 1001) and largest.numel < 1001 * 1001 / 4


def test_a_block_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"block=3: the network has 3, 0..2"):
        network().get_self_attention(torch.rand(1, 1, 8, 8, 8), 3)


@pytest.mark.parametrize("at", [None, "patch"])
@pytest.mark.parametrize("mode", ["full_image", "resize", "sliding_window"])
def test_maps_and_prefix_sum_to_1_and_channels_are_averaged(encoder: Encoder, mode: str, at: str | None) -> None:
    scan = made_scan((2, 20, 12, 7))
    place = None if at is None else tuple((AFFINE @ [2, 5, 6, 1])[:3])
    found = scan_attention(encoder, scan, View(mode, 16), 0, place)
    torch.testing.assert_close(found.maps.sum((1, 2, 3)) + found.prefix.sum(1), torch.ones(2))
    np.testing.assert_allclose(found.affine, encoder.encode_scan(scan, View(mode, 16)).affine)
    if mode == "full_image":
        padded = torch.nn.functional.pad(scan.data, [0, 1], value=-1)[:, None]
        cell = 0 if at is None else 1 + (0 * 3 + 1) * 2 + 1  # patch (0, 1, 1) of 5 x 3 x 2
        rows = encoder.backbone.get_self_attention(padded, 0)[:, :, cell].mean(0)
        torch.testing.assert_close(torch.cat([found.prefix, found.maps.flatten(1)], 1), rows)
    if mode == "sliding_window":
        empty = found.maps[:, 4:]  # windows along H start at 0 and 4; the last patch is in the second alone
        assert bool((empty == 0).all()) == (at is not None)


def test_a_place_outside_and_a_layer_too_many_are_one_line(encoder: Encoder) -> None:
    with pytest.raises(BadInput, match=r"made: \(500, 0, 0\) mm lies outside of its foreground, which runs from \(-9, 4, 30\)"):
        scan_attention(encoder, made_scan(), View(), 0, (500.0, 0.0, 0.0))
    with pytest.raises(BadInput, match="layer 2: the network has 2: choose 0 to 1"):
        scan_attention(encoder, made_scan(), View(), 2)
