"""The dense read-out: what does a linear map of frozen patch features know of the labels beneath, where position is no help?

Crops are cut at random places, so that where a patch lies in its crop says little about what it shows. A multinomial logistic
regression learns each patch's shares of the classes; the class of the largest logit fills the patch. Validation scans choose
the penalty and what is added to the logits of the foreground (with weak features, Dice is best below even odds). Dice is
bounded by the patches' coarseness: compare with that of the true shares (`ceiling`), not with a segmentation network's.

Shapes: C crops, H W D their edges (voxels), h w d their patches, R = C h w d, K classes (0 is background), F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.data.cache.store import VolumeStore
from dinov2.data.datalist import Entry
from dinov2.data.volumes.opening import as_whole, describe, open_volume

PENALTIES = (1e-4, 1e-3, 1e-2)
FOREGROUND_OFFSETS = (0.0, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class LabelledCrops:
    """Crops of one scan.

    Attributes:
        windows: [C, 1, H, W, D] in [-1, 1], prepared as for pretraining; as many in place of the 1 as an image has channels.
        labels: [C, H, W, D] int64; what is below 0 counts nowhere.
    """

    windows: Tensor
    labels: Tensor


def random_crops(image: Path, label: Path, size: Sequence[int], count: int, seed: Sequence[int]) -> LabelledCrops:
    """Crops of a scan at random places, padded with background where the scan is smaller.

    Raises:
        BadVolume: A file cannot be used.
    """
    rng = np.random.default_rng(list(seed))
    volume = VolumeStore([Entry(str(image), tuple(describe(image)["shape"]))], 0).get(0, rng)
    raw = open_volume(Entry(str(label), ()))
    labels = torch.from_numpy(volume.align(as_whole(raw.read(), raw.image.step)).astype(np.int64))
    return cut_crops(volume.data, labels, size, count, rng)


def cut_crops(image: Tensor, labels: Tensor, size: Sequence[int], count: int, rng: np.random.Generator) -> LabelledCrops:
    """Crops at random places of an image [channels, H, W, D] and its labels [H, W, D], padded where it is smaller."""
    room = [(0, max(0, s - n)) for s, n in zip(size, labels.shape, strict=True)]
    padding = [x for pair in reversed(room) for x in pair]
    image, labels = F.pad(image, padding, value=-1.0), F.pad(labels, padding)
    windows, cut = [], []
    for _ in range(count):
        start = [int(rng.integers(n - s + 1)) for n, s in zip(labels.shape, size, strict=True)]
        box = tuple(slice(a, a + s) for a, s in zip(start, size, strict=True))
        windows.append(image[:, *box])
        cut.append(labels[box])
    return LabelledCrops(torch.stack(windows), torch.stack(cut))


def raw_features(windows: Tensor, patch_size: int) -> Tensor:
    """What a linear map has without a network: a patch's voxels, the means of its 26 neighbours, its place in the crop.

    Args:
        windows: [C, 1, H, W, D].

    Returns:
        [C, h, w, d, p^3 + 27 + 3].
    """
    p, (n, _, *edges) = patch_size, windows.shape
    h, w, d = (edge // p for edge in edges)
    patches = windows.view(n, h, p, w, p, d, p).permute(0, 1, 3, 5, 2, 4, 6).reshape(n, h, w, d, -1)
    means = F.pad(patches.mean(-1)[:, None], [1] * 6, mode="replicate")[:, 0]
    around = [means[:, i : i + h, j : j + w, k : k + d] for i in range(3) for j in range(3) for k in range(3)]
    place = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, g) for g in (h, w, d)], indexing="ij"), -1)
    return torch.cat([patches, torch.stack(around, -1), place.expand(n, h, w, d, 3)], -1)


def class_shares(labels: Tensor, patch_size: int, num_classes: int) -> Tensor:
    """[C, H, W, D] labels -> [C, h, w, d, K] share of each class in each patch."""
    one_hot = (F.one_hot(labels.clamp_min(0), num_classes) * (labels >= 0)[..., None]).movedim(-1, 1).float()
    return F.avg_pool3d(one_hot, patch_size).movedim(1, -1)


def fit_logistic(features: Tensor, shares: Tensor, penalty: float, steps: int = 60) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression from standardised features [R, F] to shares [R, K]; maps [.., F] to logits [.., K]."""
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    x = (features - mean) / std
    weights = torch.zeros(x.shape[1], shares.shape[1], requires_grad=True)
    offset = shares.mean(0).clamp_min(1e-6).log().requires_grad_()
    optimizer = torch.optim.LBFGS([weights, offset], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weights + offset, shares) + penalty * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    matrix, constant = weights.detach(), offset.detach()
    return lambda new: ((new - mean) / std) @ matrix + constant


def dice_of_patches(scores: Tensor, labels: Tensor) -> float:
    """Mean Dice of the foreground classes that occur in a scan's crops or their prediction.

    Args:
        scores: [C, h, w, d, K]; the largest fills the patch.
        labels: [C, H, W, D].
    """
    patch_size = labels.shape[1] // scores.shape[1]
    found = scores.argmax(-1)
    for axis in (1, 2, 3):
        found = found.repeat_interleave(patch_size, axis)
    dice = []
    for k in range(1, scores.shape[-1]):
        a, b = (found == k) & (labels >= 0), labels == k
        if total := int(a.sum() + b.sum()):
            dice.append(2 * int((a & b).sum()) / total)
    return float(np.mean(dice)) if dice else float("nan")


def ceiling(crops: Sequence[LabelledCrops], patch_size: int, num_classes: int) -> list[float]:
    """Dice of each scan where every patch is filled with its commonest class."""
    return [dice_of_patches(class_shares(c.labels, patch_size, num_classes), c.labels) for c in crops]


def read_out(
    extract: Callable[[Tensor], Tensor],
    parts: dict[str, list[LabelledCrops]],
    counts: Sequence[int],
    patch_size: int,
    num_classes: int,
) -> dict[int, list[float]]:
    """Dice of each test scan by the number of labelled training scans: the first n of the training part.

    Args:
        extract: Windows [C, 1, H, W, D] -> features [C, h, w, d, F].
        parts: `training`, `validation` (chooses the penalty) and `test`.
    """
    features = {part: [extract(c.windows) for c in crops] for part, crops in parts.items()}
    shares = [class_shares(c.labels, patch_size, num_classes) for c in parts["training"]]
    found = {}
    for n in counts:
        x = torch.cat([f.flatten(0, 3) for f in features["training"][:n]])
        y = torch.cat([s.flatten(0, 3) for s in shares[:n]])
        choices = []  # (validation Dice, the fit, the offset)
        for fit in (fit_logistic(x, y, penalty) for penalty in PENALTIES):
            logits = [fit(f) for f in features["validation"]]
            for offset in FOREGROUND_OFFSETS:
                choices.append((np.nanmean(dice_of(logits, offset, parts["validation"])), fit, offset))
        _, fit, offset = max(choices, key=lambda choice: choice[0])
        found[n] = dice_of([fit(f) for f in features["test"]], offset, parts["test"])
    return found


def dice_of(logits: Sequence[Tensor], foreground_offset: float, crops: Sequence[LabelledCrops]) -> list[float]:
    """Dice of each scan from its patches' logits [C, h, w, d, K], with something added to the foreground's."""
    added = foreground_offset * (torch.arange(logits[0].shape[-1]) > 0)
    return [dice_of_patches(z + added, c.labels) for z, c in zip(logits, crops, strict=True)]
