"""How the adapter's pyramid and the transformer's tokens tell each other what they have seen.

The norms of the pyramid, tens of thousands of rows, are folded into the products behind them (`layers/folding.py`): of each the
normalised rows are kept for the backward pass, in the products' precision, and nothing else.

# B batch, N patches, S voxels of the pyramid (1/4, 1/8 and 1/16 side by side), E width, K channels of an image
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dinov2.eval.segmentation_3d.deformable import MSDeformAttn3d, Size3, cell_centres, in_compute_dtype
from dinov2.layers.folding import norm_in_weights, normalised


class Layout(NamedTuple):
    """Where tokens are.

    Attributes:
        grid: (h, w, d) of the patches.
        levels: (H, W, D) of the pyramid's levels.
        patch_places: [N, 3] centres, in [0, 1].
        pyramid_places: [S, 3] centres, in [0, 1].
    """

    grid: Size3
    levels: list[Size3]
    patch_places: Tensor
    pyramid_places: Tensor


def make_layout(grid: Size3, levels: list[Size3], device: torch.device) -> Layout:
    return Layout(grid, levels, cell_centres([grid], device), cell_centres(levels, device))


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's branch is left out with probability `rate`, else scaled up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class ConvFFN(nn.Module):
    """Linear, depth-wise convolution within each level, GELU, linear.

    Args:
        dim: E.
        ratio: Width inside over E.
    """

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = max(1, int(dim * ratio))
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv3d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, levels: list[Size3]) -> Tensor:
        """[B, S, E] -> [B, S, E]."""
        parts = self.fc1(x).transpose(1, 2).split([h * w * d for h, w, d in levels], dim=2)
        volumes = [for_depthwise(p.unflatten(2, size)) for p, size in zip(parts, levels, strict=True)]  # [B, hidden, H, W, D]
        convolved = [self.dwconv(v).flatten(2) for v in volumes]
        return self.fc2(self.act(torch.cat(convolved, 2).transpose(1, 2)))


def for_depthwise(x: Tensor) -> Tensor:
    """[B, C, H, W, D] as a depth-wise convolution should get it: on a GPU copied, so that a channel's voxels lie side by side.

    As a linear layer leaves them, with a voxel's channels side by side, torch hands volumes to cuDNN, which makes the weight's
    gradient by a call for every channel (docs/gpu.md). Torch's own kernels, which do it at once, take the other order only.
    """
    return x.contiguous() if x.is_cuda else x


class Injector(nn.Module):
    """What the patches read from the pyramid; nothing at first (`gamma` = 0): the pretrained network starts as it was."""

    def __init__(self, dim: int, num_levels: int, num_points: int, ratio: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MSDeformAttn3d(dim, num_levels, num_points, ratio)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, patches: Tensor, pyramid: Tensor, layout: Layout) -> Tensor:
        """[B, N, E], [B, S, E] -> what to add to the patches, [B, N, E]."""
        query, values = in_compute_dtype(self.query_norm(patches)), normalised(pyramid, self.feat_norm.eps)
        weights = norm_in_weights(self.feat_norm, "value_proj", self.attn.value_proj)
        return self.gamma * functional_call(self.attn, weights, (query, layout.patch_places, values, layout.levels))


class Extractor(nn.Module):
    """The pyramid reads from the patches, then mixes among neighbours."""

    def __init__(self, dim: int, num_points: int, ratio: float, ffn_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MSDeformAttn3d(dim, 1, num_points, ratio)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = ConvFFN(dim, ffn_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, pyramid: Tensor, patches: Tensor, layout: Layout) -> Tensor:
        """[B, S, E], [B, N, E] -> the new pyramid [B, S, E]."""
        query, values = normalised(pyramid, self.query_norm.eps), in_compute_dtype(self.feat_norm(patches))
        weights = norm_in_weights(self.query_norm, "sampling_offsets", self.attn.sampling_offsets)
        weights |= norm_in_weights(self.query_norm, "attention_weights", self.attn.attention_weights)
        pyramid = pyramid + functional_call(self.attn, weights, (query, layout.pyramid_places, values, [layout.grid]))
        weights = norm_in_weights(self.ffn_norm, "fc1", self.ffn.fc1)
        mixed = functional_call(self.ffn, weights, (normalised(pyramid, self.ffn_norm.eps), layout.levels))
        return pyramid + self.drop_path(mixed)
