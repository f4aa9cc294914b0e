"""Region retrieval: is the crop of another person's scan that looks most alike the same place of the body?

Every crop of one scan asks for its most similar crop in another; the error is how far that lies from the corresponding place.
The asking scan can be turned and its contrast changed at random first: between heads that lie and look alike, comparing voxels
is all it takes. Places correspond by their share of the foreground's box along each axis, which is rough (a few mm between
heads), so errors are compared between features and not read as accuracies.

Shapes: N crops of a scan, s their edge (voxels), F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor

from dinov2.features.scans import Scan

MAX_ANGLE = 0.3  # radians about each axis
MAX_LOG_GAMMA = 0.4


@dataclass(frozen=True)
class Places:
    """Crops of one scan and where they lie.

    Attributes:
        windows: [N, 1, s, s, s] in [-1, 1].
        centres_mm: [N, 3] in the scan as prepared, along its own axes.
        extent_mm: [3] of the foreground's box.
    """

    windows: Tensor
    centres_mm: np.ndarray
    extent_mm: np.ndarray


def places_of(scan: Scan, size: int, step: int, rng: np.random.Generator | None = None, min_foreground: float = 0.5) -> Places:
    """Crops of a prepared scan (cropped to its foreground) every `step` voxels.

    Args:
        size: s.
        rng: Of the turn (about the centre) and the contrast (gamma) of an asking scan; None: the scan as it is.
        min_foreground: Share of voxels above background (-1) that a crop must have.
    """
    volume = scan.data[0].numpy()
    spacing = np.linalg.norm(scan.affine[:3, :3], axis=0)
    middle = (np.array(volume.shape) - 1) / 2
    turn = np.eye(3)  # voxels of the crops' volume -> voxels of the scan, about the middle
    if rng is not None:
        angles = rng.uniform(-MAX_ANGLE, MAX_ANGLE, 3)
        turn = np.diag(1 / spacing) @ Rotation.from_euler("xyz", angles).as_matrix() @ np.diag(spacing)
        volume = ndimage.affine_transform(volume, turn, middle - turn @ middle, order=1, cval=-1.0)
        gamma = np.exp(rng.uniform(-MAX_LOG_GAMMA, MAX_LOG_GAMMA))
        volume = (2 * ((volume.clip(-1, 1) + 1) / 2) ** gamma - 1).astype(np.float32)
    windows = torch.from_numpy(volume).unfold(0, size, step).unfold(1, size, step).unfold(2, size, step)  # [a, b, c, s, s, s]
    used = (windows > -1).float().mean((3, 4, 5)) >= min_foreground
    centres_vox = used.nonzero().numpy() * step + (size - 1) / 2
    centres_mm = ((centres_vox - middle) @ turn.T + middle) * spacing
    return Places(windows[used][:, None].contiguous(), centres_mm, np.array(scan.voxels.shape[1:]) * spacing)


def retrieval_errors(asking: Places, x: Tensor, searched: Places, y: Tensor) -> np.ndarray:
    """Distance (mm) of each asking crop's most similar crop from the corresponding place.

    Args:
        x, y: [N, F] features of the two scans' crops, compared by cosine about each scan's mean.
    """
    x, y = (F.normalize(z - z.mean(0), dim=1) for z in (x, y))
    best = (x @ y.T).argmax(1).numpy()
    wanted = asking.centres_mm / asking.extent_mm * searched.extent_mm
    return np.linalg.norm(searched.centres_mm[best] - wanted, axis=1)


def median_errors(
    asking: Sequence[Places], asked: Sequence[Tensor], searched: Sequence[Places], found: Sequence[Tensor]
) -> list[float]:
    """Of each scan that asks the median error over its crops and all other scans.

    Args:
        asking, searched: The same scans in the same order.
        asked, found: [N, F] features of their crops.
    """

    def errors(a: int) -> np.ndarray:
        others = [b for b in range(len(searched)) if b != a]
        return np.concatenate([retrieval_errors(asking[a], asked[a], searched[b], found[b]) for b in others])

    return [float(np.median(errors(a))) for a in range(len(asking))]
