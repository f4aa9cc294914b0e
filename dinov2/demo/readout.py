"""The frozen tissue read-out: can a linear map from patch features tell the tissue, learnt from one or five volumes?

Crops are cut at random places and turned at random, so that the position in a crop does not give the answer.
Shapes: R patches of all crops, F features, 4 classes (outside, CSF, grey matter, white matter).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from dinov2.data.cache.store import VolumeStore
from dinov2.data.datalist import Entry
from dinov2.demo.generate import TISSUES, Case
from dinov2.geometry import pair

CROP = 16  # voxels, the size the network was trained on
CROPS_PER_VOLUME = 48
RIDGES = (1e-1, 1e0, 1e1, 1e2, 1e3, 1e4)
NUM_CLASSES = 1 + len(TISSUES)


@dataclass(frozen=True)
class LabelledCrops:
    """Crops of one volume with the share of each class in every patch."""

    windows: Tensor  # [C, 1, s, s, s]
    shares: Tensor  # [C, g, g, g, 4]


def labelled_crops(case: Case, patch_size: int, seed: int, voxel: int = CROP) -> LabelledCrops:
    """Random crops of a preprocessed volume, each turned at random, with their labels."""
    image, label_map = (nib.Nifti1Image.from_filename(path) for path in (case.image, case.label))
    entry = Entry(str(case.image), tuple(image.shape))
    rng = np.random.default_rng([seed, case.subject])
    volume = VolumeStore([entry], 0).get(0, rng)
    labels = volume.align(np.asarray(label_map.dataobj))
    windows: list[Tensor] = []
    shares: list[Tensor] = []
    while len(windows) < CROPS_PER_VOLUME:
        start = [int(rng.integers(max(1, n - voxel + 1))) for n in labels.shape]
        box = tuple(slice(a, a + voxel) for a in start)
        label = _padded(torch.from_numpy(labels[box]).long(), voxel, 0)
        if (label > 0).float().mean() < 0.3:
            continue
        turn = [(int(rng.integers(4)), plane) for plane in ((0, 1), (1, 2), (0, 2))]
        window = _padded(volume.data[0][box], voxel, -1.0)
        for k, plane in turn:
            window, label = torch.rot90(window, k, plane), torch.rot90(label, k, plane)
        g = voxel // patch_size
        one_hot = torch.nn.functional.one_hot(label, NUM_CLASSES).float()
        patches = one_hot.view(g, patch_size, g, patch_size, g, patch_size, NUM_CLASSES).mean((1, 3, 5))
        windows.append(window[None])
        shares.append(patches)
    return LabelledCrops(torch.stack(windows), torch.stack(shares))


def _padded(x: Tensor, edge: int, value: float) -> Tensor:
    return torch.nn.functional.pad(x, [v for n in reversed(x.shape) for v in (0, edge - n)], value=value)


def fit_ridge(features: Tensor, shares: Tensor, ridge: float) -> Callable[[Tensor], Tensor]:
    """Least squares from standardised features [R, F] to class shares [R, 4], with an L2 penalty."""
    x, y = features.double(), shares.double()
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    z = (x - mean) / std
    offset = y.mean(0)
    weights = torch.linalg.solve(z.T @ z + ridge * torch.eye(z.shape[1], dtype=z.dtype), z.T @ (y - offset))
    return lambda new: ((new.double() - mean) / std) @ weights + offset


def agreement(predicted: Tensor, truth: Tensor) -> float:
    """Pearson correlation between predicted and true shares [R, 4] over patches, mean of the three tissues.

    A patch of several millimetres holds several tissues, so shares say more than one label a patch.
    """
    a, b = (x.double()[:, list(TISSUES)] for x in (predicted, truth))
    a, b = a - a.mean(0), b - b.mean(0)
    return float(((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-12)).mean())


def read_out(train: list[tuple[Tensor, Tensor]], test: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Agreement per test volume of the best ridge, chosen on the last fifth of the labelled crops.

    Args:
        train, test: (features [C, g, g, g, F], shares [C, g, g, g, 4]) per volume.
    """
    flat = [(f.flatten(1, 3), s.flatten(1, 3)) for f, s in train]

    def joined(part: slice) -> tuple[Tensor, Tensor]:
        return pair(torch.cat([x[i][part].flatten(0, 1) for x in flat]) for i in range(2))

    held_out = max(1, CROPS_PER_VOLUME // 5)
    fit_x, fit_y = joined(slice(None, -held_out))
    choose_x, choose_y = joined(slice(-held_out, None))

    def score(ridge: float) -> float:
        return agreement(fit_ridge(fit_x, fit_y, ridge)(choose_x), choose_y)

    best = max(RIDGES, key=score)
    predict = fit_ridge(*joined(slice(None)), best)
    return [agreement(predict(f.flatten(0, 3)), s.flatten(0, 3)) for f, s in test]
