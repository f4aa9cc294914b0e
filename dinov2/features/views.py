"""What a frozen network makes of a volume seen whole, resized or through a sliding window.

Shapes: B batch, H W D voxels, h w d patches, p patch size, E embedding, n layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.distributed.precision import autocast
from dinov2.errors import BadInput
from dinov2.geometry import Spacing, triple
from dinov2.models.backbone import Backbone

MODES = ("full_image", "resize", "sliding_window")


@dataclass(frozen=True)
class View:
    """How a volume is shown to the network.

    Attributes:
        mode: `full_image`: all of it in one pass, padded at the far ends to a multiple of the patch size. `resize`: brought to
            `size` cubed. `sliding_window`: windows of `size` cubed or less; tokens are averaged where they overlap.
        size: Edge (voxels), a multiple of the patch size; None: that of the network's pretraining.
        overlap: Of neighbouring windows, within [0, 1); the step is a whole number of patches.
        layers: Of how many of the last layers the patch tokens are given, side by side.
        batch_size: Volumes or windows per pass; does not change results beyond rounding.
        spacing_mm: What a scan is brought to before it is shown (`features.spacing`), not by `look`; None: it stays as it is.
    """

    mode: str = "full_image"
    size: int | None = None
    overlap: float = 0.5
    layers: int = 1
    batch_size: int = 8
    spacing_mm: Spacing | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise BadInput(f"mode {self.mode!r}: choose one of {', '.join(MODES)}")
        if not 0 <= self.overlap < 1:
            raise BadInput(f"overlap {self.overlap}: must be at least 0 and below 1")
        if self.layers < 1 or self.batch_size < 1:
            raise BadInput(f"layers {self.layers} and batch size {self.batch_size}: both must be at least 1")

    def fitted(self, backbone: Backbone) -> int:
        """The edge for a network.

        Raises:
            BadInput: Not a multiple of its patch size, or more layers than it has.
        """
        p, depth = backbone.patch_size, backbone.num_layers
        size = self.size or backbone.input_size
        if size % p or size < p:
            raise BadInput(f"size {size}: must be a multiple of the network's patch size {p}")
        if self.layers > depth:
            raise BadInput(f"layers {self.layers}: the network has {depth}")
        return size


class Tokens(NamedTuple):
    """What a network makes of volumes.

    Attributes:
        cls: [B, E] normed class token of the last layer; with windows their mean.
        patch: [B, h, w, d, n * E] normed patch tokens of the last n layers, the last layer's last.
        step_vox: Distance of neighbouring patches along H, W, D, in voxels of the volume that was given.
    """

    cls: Tensor
    patch: Tensor
    step_vox: tuple[float, float, float]


@torch.no_grad()  # not inference mode: a probe may be trained on the result
def look(backbone: Backbone, volumes: Tensor, view: View, dtype: torch.dtype = torch.float32) -> Tokens:
    """Tokens of volumes of one channel.

    Args:
        backbone: In evaluation mode.
        volumes: [B, 1, H, W, D] float32 in [-1, 1].
        view: How they are shown.
        dtype: Of matrix products (autocast).

    Returns:
        float32, on the network's device.

    Raises:
        BadInput: The view does not fit the network.
    """
    size = view.fitted(backbone)
    volumes, step = whole_patches(volumes, view, size, backbone.patch_size)
    if view.mode == "sliding_window":
        return Tokens(*_slide(backbone, volumes, size, view, dtype), step)
    parts = [_pass(backbone, part, view.layers, dtype) for part in volumes.split(view.batch_size)]
    return Tokens(torch.cat([cls for cls, _ in parts]), torch.cat([patch for _, patch in parts]), step)


def whole_patches(volumes: Tensor, view: View, size: int, patch_size: int) -> tuple[Tensor, Spacing]:
    """Volumes [B, 1, H, W, D] as whole patches, resized or padded at the far ends; and how many given voxels a patch is."""
    if view.mode == "resize":
        step = triple(patch_size * n / size for n in volumes.shape[2:])
        return F.interpolate(volumes, (size,) * 3, mode="trilinear", align_corners=False), step
    missing = [-n % patch_size for n in volumes.shape[2:]]
    padding = [0, missing[2], 0, missing[1], 0, missing[0]]  # the last axis comes first
    return F.pad(volumes, padding, value=-1.0), triple([float(patch_size)] * 3)


def window_boxes(lengths: Sequence[int], size: int, patch_size: int, overlap: float) -> list[tuple[slice, ...]]:
    """Windows over a padded volume, which start at whole patches; along a short axis a window is as long as the volume."""
    edges = [min(size, n) for n in lengths]
    starts = (_starts(n, edge, patch_size, overlap) for n, edge in zip(lengths, edges, strict=True))
    return [tuple(slice(a, a + edge) for a, edge in zip(corner, edges, strict=True)) for corner in product(*starts)]


def _pass(backbone: Backbone, volumes: Tensor, layers: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[B, E] and [B, h, w, d, n * E] of one forward pass."""
    device = next(backbone.parameters()).device
    with autocast(device.type, dtype):
        outputs = backbone.get_intermediate_layers(volumes.to(device), layers, reshape=True, return_class_token=True)
    patch = torch.cat([maps for maps, _ in outputs], 1).movedim(1, -1)
    return outputs[-1][1].float(), patch.float()


def _slide(backbone: Backbone, volumes: Tensor, size: int, view: View, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `_pass`, by windows, averaged where they overlap."""
    p, lengths = backbone.patch_size, volumes.shape[2:]
    boxes = window_boxes(lengths, size, p, view.overlap)
    grid, device = [n // p for n in lengths], next(backbone.parameters()).device
    total = torch.zeros(len(volumes), *grid, view.layers * backbone.embed_dim, device=device)
    count = torch.zeros(*grid, 1, device=device)
    cls_sum = torch.zeros(len(volumes), backbone.embed_dim, device=device)
    for first in range(0, len(boxes), view.batch_size):
        part = boxes[first : first + view.batch_size]
        windows = torch.cat([volumes[:, :, *box] for box in part])  # [windows * B, 1, ...]
        cls, patch = _pass(backbone, windows, view.layers, dtype)
        for box, tokens in zip(part, patch.split(len(volumes)), strict=True):
            cells = tuple(slice(b.start // p, b.stop // p) for b in box)
            total[:, *cells] += tokens
            count[cells] += 1
        cls_sum += cls.view(len(part), len(volumes), -1).sum(0)
    return cls_sum / len(boxes), total / count


def grid_affine(affine: Tensor, step_vox: Spacing, patch_vox: Spacing | None = None) -> Tensor:
    """Grid index (a patch's centre) -> mm.

    Args:
        affine: Voxel -> mm, [4, 4] or [B, 4, 4].
        step_vox: Distance of neighbouring patches.
        patch_vox: Edges of a patch; None: patches lie side by side.
    """
    step = torch.diag(torch.tensor([*step_vox, 1.0], dtype=torch.float64))
    step[:3, 3] = (torch.tensor(patch_vox or step_vox, dtype=torch.float64) - 1) / 2  # the centre of the first patch
    return affine.double() @ step


def _starts(length: int, edge: int, patch_size: int, overlap: float) -> list[int]:
    """Where windows start along an axis, the last one at its end; all numbers are multiples of the patch size."""
    step = max(patch_size, int(edge * (1 - overlap)) // patch_size * patch_size)
    return [*range(0, length - edge, step), length - edge]
