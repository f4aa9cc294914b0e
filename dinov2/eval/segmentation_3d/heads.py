"""Segmentation networks: a backbone and one of three decoders, volume -> logits of its own size; beside them whole networks.

# B batch, K channels, E width of the backbone, R outputs
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.errors import BadInput
from dinov2.eval.segmentation_3d.adapter import PAPER, AdapterOptions, ChannelMerge, ViTAdapter3d
from dinov2.eval.segmentation_3d.swin import SwinUNETR3d
from dinov2.eval.segmentation_3d.unet import UNet3d
from dinov2.geometry import triple
from dinov2.layers.plain_memory import in_plain_memory
from dinov2.models import BackboneModule, BlockBackbone

NUM_LAST_LAYERS = 4  # that the linear decoder reads


def residual_block(channels_in: int, channels_out: int) -> nn.Module:
    """Two 3x3x3 convolutions with instance norm, leaky ReLU and a skip connection."""
    from monai.networks.blocks import UnetResBlock

    return UnetResBlock(3, channels_in, channels_out, kernel_size=3, stride=1, norm_name="instance")


class UpBlock(nn.Module):
    """Twice the size by a transposed convolution, beside it what was there on the way down, then a residual block."""

    def __init__(self, channels_in: int, channels_skip: int, channels_out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(channels_in, channels_out, 2, 2)
        self.block = residual_block(channels_out + channels_skip, channels_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """[B, c, h, w, d] and [B, c', h', w', d'] with h' of 2h or 2h - 1 -> [B, c'', h', w', d']."""
        crop = tuple(slice(n) for n in skip.shape[2:])
        return self.block(torch.cat([self.up(x)[:, :, *crop], skip], 1))


class ViTAdapterUNETR(nn.Module):
    """The adapter's pyramid, decoded by four transposed convolutions with skip connections; the last skip is the image's.

    Args:
        backbone: See `ViTAdapter3d`.
        num_channels: K.
        num_outputs: R.
        decoder_channels: Widths at 1/8, 1/4, 1/2 and 1 of the size.
        options: Of the adapter.

    Source: 3DINO paper, "3DINO segmentation", Extended data Fig. 1a.
    """

    def __init__(
        self,
        backbone: BlockBackbone,
        num_channels: int,
        num_outputs: int,
        decoder_channels: Sequence[int] = (256, 128, 64, 32),
        options: AdapterOptions = PAPER,
    ) -> None:
        super().__init__()
        widths, dim = list(decoder_channels), backbone.embed_dim
        self.adapter = ViTAdapter3d(backbone, num_channels, options)
        self.image_block = residual_block(num_channels, widths[3])
        skips = [dim, dim, dim, widths[3]]
        inputs = [dim, *widths[:3]]
        self.up_blocks = nn.ModuleList(UpBlock(i, s, o) for i, s, o in zip(inputs, skips, widths, strict=True))
        self.out = nn.Conv3d(widths[3], num_outputs, 1)
        in_plain_memory(self)

    @property
    def backbone(self) -> BlockBackbone:
        return self.adapter.backbone

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, H, W, D] -> logits [B, R, H, W, D]."""
        f1, f2, f3, f4 = self.adapter(x)
        out = f4
        for block, skip in zip(self.up_blocks, (f3, f2, f1, self.image_block(x)), strict=True):
            out = block(out, skip)
        return self.out(out)


class UNETR(nn.Module):
    """UNETR's decoder on the blocks at a quarter, half, three quarters and all of the depth.

    The tokens of full depth are the coarsest map; those of three quarters join at twice its size, of half at four times, of a
    quarter at eight times. With a patch below 16 the last ones join at the image's own size.

    Args:
        backbone: Any patch size that is a power of two, 2 to 16.
        num_channels, num_outputs: K, R.
        decoder_channels: The last log2(patch) of these widths are used.

    Raises:
        BadInput: Another patch size.

    Source: Hatamizadeh et al. (2022); 3DINO paper, "SOTA segmentation comparisons".
    """

    def __init__(self, backbone: BackboneModule, num_channels: int, num_outputs: int, decoder_channels: Sequence[int]) -> None:
        super().__init__()
        num_ups = int(math.log2(backbone.patch_size))
        if 2**num_ups != backbone.patch_size or not 1 <= num_ups <= 4:
            raise BadInput(f"UNETR needs a patch size of 2, 4, 8 or 16, this backbone has {backbone.patch_size}")
        self.backbone = backbone
        self.num_channels = num_channels
        depth, dim = backbone.num_layers, backbone.embed_dim
        self.layers = sorted({max(0, depth * k // 4 - 1) for k in (1, 2, 3, 4)})
        widths = list(decoder_channels)[-num_ups:]
        self.merges = nn.ModuleList(ChannelMerge(num_channels, dim) for _ in self.layers)
        earlier = list(range(len(self.layers) - 1))[::-1]  # three quarters, half, a quarter
        self.joins = [min(j, num_ups) for j in range(1, len(earlier) + 1)]  # doublings at which each joins
        self.projections = nn.ModuleList(_project(dim, widths[:join]) for join in self.joins)
        self.image_block = residual_block(num_channels, widths[-1])
        inputs, skips = [dim, *widths[:-1]], [widths[u] * self.joins.count(u + 1) for u in range(num_ups)]
        skips[-1] += widths[-1]
        self.up_blocks = nn.ModuleList(UpBlock(i, s, o) for i, s, o in zip(inputs, skips, widths, strict=True))
        self.out = nn.Conv3d(widths[-1], num_outputs, 1)
        in_plain_memory(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, H, W, D] -> logits [B, R, H, W, D]."""
        maps = _layer_maps(self.backbone, x, self.layers, self.merges)  # quarter ... full
        out, earlier = maps[-1], maps[-2::-1]
        projected = [project(m) for project, m in zip(self.projections, earlier, strict=True)]
        for level, block in enumerate(self.up_blocks, 1):
            skips = [p for p, join in zip(projected, self.joins, strict=True) if join == level]
            if level == len(self.up_blocks):
                skips.append(self.image_block(x))
            out = block(out, torch.cat(skips, 1))
        return self.out(out)


def _project(dim: int, widths: Sequence[int]) -> nn.Sequential:
    """Tokens' map to the last width, doubled in size once for each."""
    steps = []
    for before, width in zip([dim, *widths[:-1]], widths, strict=True):
        steps += [nn.ConvTranspose3d(before, width, 2, 2), residual_block(width, width)]
    return nn.Sequential(*steps)


class Linear(nn.Module):
    """Two linear layers on the last four blocks' tokens: channels merged (GELU), then classes; logits upsampled trilinearly.

    Args:
        backbone: Any.
        num_channels, num_outputs: K, R.
        batch_norm: A BatchNorm between the two.

    Source: 3DINO paper, "Linear decoder segmentation".
    """

    def __init__(self, backbone: BackboneModule, num_channels: int, num_outputs: int, batch_norm: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_channels = num_channels
        depth, dim = backbone.num_layers, backbone.embed_dim
        self.layers = list(range(max(0, depth - NUM_LAST_LAYERS), depth))
        self.merge = ChannelMerge(num_channels, dim)
        self.norm = nn.BatchNorm3d(dim * len(self.layers)) if batch_norm else nn.Identity()
        self.out = nn.Conv3d(dim * len(self.layers), num_outputs, 1)
        in_plain_memory(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, H, W, D] -> logits [B, R, H, W, D]."""
        maps = _layer_maps(self.backbone, x, self.layers, [self.merge] * len(self.layers))
        return F.interpolate(self.out(self.norm(torch.cat(maps, 1))), x.shape[2:], mode="trilinear")


SegmentationNetwork = Linear | UNETR | ViTAdapterUNETR | SwinUNETR3d | UNet3d


def _layer_maps(backbone: BackboneModule, x: Tensor, layers: Sequence[int], merges: Iterable[nn.Module]) -> list[Tensor]:
    """Normed tokens after each of the blocks, channels merged: [B, E, h, w, d] each."""
    each = x.flatten(0, 1)[:, None]  # [B*K, 1, H, W, D]
    grid = triple(n // backbone.patch_size for n in x.shape[2:])
    with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in backbone.parameters())):
        tokens = backbone.get_intermediate_layers(each, layers)
    return [merge(t).transpose(1, 2).unflatten(2, grid) for merge, t in zip(merges, tokens, strict=True)]
