"""Frozen patch features, the one way they are taken.

Shapes: B windows, s their edge (voxels), p patch size, g = s/p patches an edge, E embedding, n layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2.models.backbone import Backbone


@torch.inference_mode()
def patch_features(backbone: Backbone, windows: Tensor, layers: int = 4, batch_size: int = 32) -> Tensor:
    """Normed patch tokens of the last layers side by side.

    Args:
        backbone: In evaluation mode.
        windows: [B, 1, s, s, s] float32 in [-1, 1].
        layers: How many of the last layers.
        batch_size: Windows per pass.

    Returns:
        [B, g, g, g, layers * E] on the windows' device.
    """
    device = next(backbone.parameters()).device
    out = []
    for part in windows.split(batch_size):
        maps = backbone.get_intermediate_layers(part.to(device), layers, reshape=True)
        out.append(torch.cat(maps, 1).movedim(1, -1).to(windows.device))
    return torch.cat(out)


def class_features(backbone: Backbone, images: Tensor, layers: int = 4) -> Tensor:
    """Normed class tokens of the last layers in their order, then the mean of the last layer's patch tokens.

    Channels pass one by one and are averaged. Gradients are followed where they are wanted.

    Args:
        backbone: On the images' device.
        images: [B, C, s, s, s] float32 in [-1, 1].
        layers: n.

    Returns:
        [B, (n + 1) * E] float32.
    """
    pairs = backbone.get_intermediate_layers(images.flatten(0, 1)[:, None], layers, return_class_token=True)
    parts = [*(token for _, token in pairs), pairs[-1][0].mean(1)]
    return torch.cat(parts, -1).float().unflatten(0, images.shape[:2]).mean(1)


@torch.inference_mode()
def volume_features(backbone: Backbone, volume: Tensor, window: int, shift: int, batch_size: int = 64) -> Tensor:
    """Last-layer patch features of a whole volume by overlapping windows, on a grid finer than the patches.

    Windows start every half window, and again at every offset that is a multiple of `shift` below the patch size; where
    they overlap, features are averaged, so that no seams show. Windows that hold only background (-1) are left out.

    Args:
        volume: [1, H, W, D] in [-1, 1]; padded with -1.
        window: Edge of a window (voxels), a multiple of twice the patch size.
        shift: Grid step (voxels), a divisor of the patch size.

    Returns:
        [ceil(H / shift), ceil(W / shift), ceil(D / shift), E], zeros where nothing was computed.
    """
    p, half = backbone.patch_size, window // 2
    margin = half + p  # so that the border is covered as often as the middle
    room = [half * (-(-(n + 2 * margin) // half) + 2) for n in volume.shape[1:]]
    padded = volume.new_full(room, -1.0)
    padded[tuple(slice(margin, margin + n) for n in volume.shape[1:])] = volume[0]
    starts = [torch.tensor([a + o for a in range(0, r - window - p, half) for o in range(0, p, shift)]) for r in room]
    corners = torch.cartesian_prod(*starts)  # [windows, 3]
    boxes = [tuple(slice(a, a + window) for a in corner) for corner in corners.tolist()]
    used = [i for i, box in enumerate(boxes) if bool((padded[box] > -1).any())]
    total = torch.zeros(*[r // shift for r in room], backbone.embed_dim)
    count = torch.zeros(*total.shape[:3])
    patch_starts = torch.arange(window // p) * p
    for first in range(0, len(used), batch_size):
        part = used[first : first + batch_size]
        tokens = patch_features(backbone, torch.stack([padded[boxes[i]] for i in part])[:, None], 1, batch_size)
        x, y, z = ((corners[part, axis, None] + patch_starts) // shift for axis in range(3))  # 3 x [b, g]
        cells = (x[:, :, None, None], y[:, None, :, None], z[:, None, None, :])
        total.index_put_(cells, tokens, accumulate=True)
        count.index_put_(cells, torch.ones(tokens.shape[:4]), accumulate=True)
    mean = total / count.clamp_min(1)[..., None]
    first_cell = margin // shift
    return mean[tuple(slice(first_cell, first_cell - (-n // shift)) for n in volume.shape[1:])]
