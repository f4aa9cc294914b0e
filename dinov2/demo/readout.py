"""The labelled read-out: in which quarter of the brain does a patch lie, told from one crop of a few labelled volumes?

Crops are cut at random places, so that where a patch lies in its crop tells nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from dinov2.demo.generate import QUARTERS, Case
from dinov2.eval.measures.dense_readout import random_crops, raw_features, read_out
from dinov2.features.features import patch_features
from dinov2.models import Backbone

LABELLED = (1, 5)  # volumes that it learns from
NUM_VALIDATION, NUM_TEST = 2, 5
WINDOW = 32  # voxels, an edge of a crop
CROPS = 4  # of a volume


def measure(
    networks: dict[str, Backbone], cases: Sequence[Case], patch_size: int, seed: int
) -> dict[int, dict[str, list[float]]]:
    """Dice of the quarters, mean of those in a test volume: by number of labelled volumes, by features.

    Beside the networks a patch's own voxels, and those with the means of the patches around them.

    Args:
        networks: By name, in evaluation mode.
        cases: The first learn, then those that choose, then those that are tested.
        patch_size: Of the networks (voxels).
        seed: Of the crops' places.
    """
    crops = [random_crops(c.image, c.label, (WINDOW,) * 3, CROPS, (seed, c.subject)) for c in cases]
    learn, choose = max(LABELLED), max(LABELLED) + NUM_VALIDATION
    parts = {"training": crops[:learn], "validation": crops[learn:choose], "test": crops[choose:]}
    extractors: dict[str, Callable[[Tensor], Tensor]] = {n: partial(patch_features, network) for n, network in networks.items()}
    around = partial(raw_features, patch_size=patch_size)
    extractors |= {"voxels around": around, "voxels": lambda windows: around(windows)[..., : patch_size**3]}
    found = {name: read_out(extract, parts, LABELLED, patch_size, 1 + len(QUARTERS)) for name, extract in extractors.items()}
    return {n: {name: scores[n] for name, scores in found.items()} for n in LABELLED}


def summary(scores: dict[int, dict[str, list[float]]]) -> list[str]:
    """The read-out as a table, and in words whether the encoder that comes with the package is ahead."""
    names = list(next(iter(scores.values())))
    lines = [f"{'labelled volumes':>18}" + "".join(f"{name:>15}" for name in names)]
    lines += [f"{n:>18}" + "".join(f"{np.mean(of[name]):>15.3f}" for name in names) for n, of in scores.items()]
    ours, *others = names
    for n, of in scores.items():
        gains = {other: float(np.mean(of[ours]) - np.mean(of[other])) for other in others}
        said = [f"{'beats' if gain > 0 else 'does NOT beat'} {other} by {gain:+.3f}" for other, gain in gains.items()]
        lines.append(f"with {n} labelled: the {ours} {', '.join(said)}")
    return lines
