"""A 3D ViT-Adapter around a backbone whose blocks run a few at a time: volume -> pyramid at 1/2, 1/4, 1/8 and 1/16.

# B batch, K channels, R registers, N patches, S voxels of the pyramid, E width
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov2.errors import BadInput
from dinov2.eval.segmentation_3d.deformable import MSDeformAttn3d
from dinov2.eval.segmentation_3d.interaction import Extractor, Injector, Layout, make_layout
from dinov2.eval.segmentation_3d.spatial_prior import SpatialPriorModule
from dinov2.geometry import Size3, triple
from dinov2.layers.plain_memory import in_plain_memory
from dinov2.models import BlockBackbone

NUM_STAGES = 4
NUM_LEVELS = 3  # of the pyramid that is attended to: 1/4, 1/8, 1/16
NUM_EXTRA_EXTRACTORS = 2  # after the last stage
FourMaps = tuple[Tensor, Tensor, Tensor, Tensor]  # at 1/2, 1/4, 1/8 and 1/16


class AdapterOptions(NamedTuple):
    """Settings of the adapter (`segmentation.*`)."""

    inplanes: int = 64
    num_points: int = 4
    feature_ratio: float = 0.25
    ffn_ratio: float = 0.25
    drop_path: float = 0.2
    checkpointing: bool = False


PAPER = AdapterOptions()


class ChannelMerge(nn.Module):
    """Features of each channel of a volume to one: side by side -> linear -> GELU.

    Source: 3DINO paper, "Multi-channel inputs".
    """

    def __init__(self, num_channels: int, dim: int) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.linear = nn.Linear(num_channels * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B*K, N, E] -> [B, N, E]."""
        x = x.unflatten(0, (-1, self.num_channels)).transpose(1, 2).flatten(2)  # [B, N, K*E]
        return F.gelu(self.linear(x))


def init_weights(part: nn.Module) -> None:
    """First weights of the adapter's parts: the published ones' spread; deformable attention keeps its own.

    Linear layers are truncated-normal, std 0.02. Convolutions are normal, std sqrt(2 / fan), where fan is kernel^3 * outputs /
    groups, but of the transposed one 2 * outputs, a quarter of that: so the published one was measured. Its output then varies
    as its input does, since with a stride as large as the kernel each output reads every channel once. At ViT-L's width: stem
    0.034, conv3 0.017, feed-forward 0.020, up-convolution 0.031. Biases are 0.

    Source: ViT-Adapter (Chen et al., 2022), whose rule is the same in 2D but for the transposed convolution.
    """
    if isinstance(part, MSDeformAttn3d):
        return
    if isinstance(part, nn.Linear):
        nn.init.trunc_normal_(part.weight, std=0.02)
    elif isinstance(part, (nn.Conv3d, nn.ConvTranspose3d)):
        transposed = isinstance(part, nn.ConvTranspose3d)
        fan = part.out_channels * (2 if transposed else math.prod(part.kernel_size)) // part.groups
        nn.init.normal_(part.weight, std=math.sqrt(2 / fan))
    if isinstance(part, (nn.Linear, nn.Conv3d, nn.ConvTranspose3d)) and part.bias is not None:
        nn.init.zeros_(part.bias)
    for child in part.children():
        init_weights(child)


def resize_trilinear(x: Tensor, size: Size3) -> Tensor:
    """[B, E, h, w, d] -> [B, E, H, W, D] as `F.interpolate` does it, by a product along each axis.

    Its backward pass on a GPU adds every voxel to eight others by atomics, in the precision of `x`: from 7 to 56 cubed some
    four thousand half-precision numbers to each.
    """
    for axis, n in zip((4, 3, 2), reversed(size), strict=True):
        if x.shape[axis] != n:
            identity = torch.eye(x.shape[axis], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
            weights = F.interpolate(identity[None], n, mode="linear")[0].T.to(x.dtype)  # [n, n of x]
            before, after = x.shape[:axis], x.shape[axis + 1 :]
            x = (weights @ x.flatten(axis + 1)).view(*before, n, *after) if after else x @ weights.T
    return x


class ViTAdapter3d(nn.Module):
    """The transformer in four stages, each reading from a convolutional pyramid before it and writing to it afterwards.

    Every channel passes through the transformer by itself; what goes to the pyramid is their mean, and what comes from it is
    added to each. The class token and registers pass through the blocks as they are.

    Args:
        backbone: Depth divisible by four; any patch size. Whether it is trained is the caller's choice.
        num_channels: K.
        options: See `AdapterOptions`.

    Raises:
        BadInput: A depth that four does not divide, or widths that do not fit.

    Source: ViT-Adapter (Chen et al., 2022); 3DINO paper, "3D ViT-Adapter", "Multi-channel inputs", Extended data Fig. 8.
    """

    def __init__(self, backbone: BlockBackbone, num_channels: int = 1, options: AdapterOptions = PAPER) -> None:
        super().__init__()
        depth, dim = backbone.num_layers, backbone.embed_dim
        if depth % NUM_STAGES:
            raise BadInput(f"the adapter needs a depth divisible by {NUM_STAGES}, this backbone has {depth} blocks: use UNETR")
        self.backbone = backbone
        self.num_channels = num_channels
        self.checkpointing = options.checkpointing
        self.per_stage = depth // NUM_STAGES
        o = options
        make_extractor = partial(Extractor, dim, o.num_points, o.feature_ratio, o.ffn_ratio)
        self.spm = SpatialPriorModule(num_channels, dim, o.inplanes)
        self.level_embed = nn.Parameter(torch.randn(NUM_LEVELS, dim))
        self.injectors = nn.ModuleList(Injector(dim, NUM_LEVELS, o.num_points, o.feature_ratio) for _ in range(NUM_STAGES))
        self.extractors = nn.ModuleList(make_extractor(o.drop_path) for _ in range(NUM_STAGES + NUM_EXTRA_EXTRACTORS))
        self.merges = nn.ModuleList(ChannelMerge(num_channels, dim) for _ in range(NUM_STAGES))
        self.up = nn.ConvTranspose3d(dim, dim, 2, 2)
        self.norms = nn.ModuleList(nn.BatchNorm3d(dim) for _ in range(NUM_STAGES))
        for name, part in self.named_children():
            if name != "backbone":
                init_weights(part)
        in_plain_memory(self)

    def forward(self, x: Tensor) -> FourMaps:
        """[B, K, H, W, D] -> four [B, E, h, w, d] at 1/2, 1/4, 1/8 and 1/16 of the input (rounded up).

        Raises:
            ValueError: Another number of channels, or a side that is no multiple of the patch size.
        """
        if x.shape[1] != self.num_channels:
            raise ValueError(f"input {tuple(x.shape)}: expected {self.num_channels} channels")
        maps = self.spm(x)
        levels = [triple(m.shape[2:]) for m in maps[1:]]
        embedded = zip(maps[1:], self.level_embed, strict=True)
        pyramid = torch.cat([m.flatten(2).transpose(1, 2) + e.to(m.dtype) for m, e in embedded], 1)  # [B, S, E]
        each = x.flatten(0, 1)[:, None]  # [B*K, 1, H, W, D]
        grid = triple(n // self.backbone.patch_size for n in x.shape[2:])
        layout = make_layout(grid, levels, x.device)
        tokens = self.backbone.prepare_tokens_with_masks(each)  # [B*K, 1 + R + N, E]
        segment = self.backbone.segment(each, tokens)
        outputs = []
        for stage in range(NUM_STAGES):
            run = partial(checkpoint, self._stage, use_reentrant=False) if self.checkpointing else self._stage
            tokens, pyramid = run(stage, tokens, pyramid, segment, layout)
            outputs.append(self.merges[stage](self._patches(tokens)).transpose(1, 2).unflatten(2, grid))  # [B, E, h, w, d]
        return self._pyramid(maps[0], pyramid, levels, outputs)

    def _stage(self, stage: int, tokens: Tensor, pyramid: Tensor, segment: Any, layout: Layout) -> tuple[Tensor, Tensor]:
        """Inject, run a quarter of the blocks, extract; [B*K, 1 + R + N, E], [B, S, E] -> the same."""
        injected = self.injectors[stage](self._mean_patches(tokens), pyramid, layout)  # [B, N, E]
        copies = injected.repeat_interleave(self.num_channels, 0)
        tokens = torch.cat([tokens[:, : -copies.shape[1]], self._patches(tokens) + copies], 1)
        first = stage * self.per_stage
        tokens = self.backbone.run_blocks(tokens, segment, first, first + self.per_stage)
        patches = self._mean_patches(tokens)
        last = stage + 1 == NUM_STAGES
        for extractor in self.extractors[stage:] if last else self.extractors[stage : stage + 1]:
            pyramid = extractor(pyramid, patches, layout)
        return tokens, pyramid

    def _patches(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.backbone.num_prefix_tokens :]

    def _mean_patches(self, tokens: Tensor) -> Tensor:
        return self._patches(tokens).unflatten(0, (-1, self.num_channels)).mean(1)  # [B, N, E]

    def _pyramid(self, finest: Tensor, pyramid: Tensor, levels: list[Size3], outputs: list[Tensor]) -> FourMaps:
        """The pyramid as maps, each with the tokens of one stage added (resized trilinearly), normalised."""
        parts = pyramid.transpose(1, 2).split([h * w * d for h, w, d in levels], dim=2)
        maps = [part.unflatten(2, size) for part, size in zip(parts, levels, strict=True)]
        crop = tuple(slice(n) for n in finest.shape[2:])  # an odd size was rounded up on the way down
        maps = [finest + self.up(maps[0])[:, :, *crop], *maps]
        resized = [resize_trilinear(o, triple(m.shape[2:])) for o, m in zip(outputs, maps, strict=True)]
        half, quarter, eighth, sixteenth = (norm(m + o) for norm, m, o in zip(self.norms, maps, resized, strict=True))
        return half, quarter, eighth, sixteenth
