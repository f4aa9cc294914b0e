"""Counter-based randomness: every random decision is a function of (seed, kind, index), never of what ran before.

So any number of loader processes and ranks gives the same batches, and an exact resume needs only the step number.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Kind(IntEnum):
    """What a stream is for; streams of different kinds are independent."""

    ORDER = 0  # index: epoch
    SAMPLE = 1  # index: position in the global sample sequence
    MASKS = 2  # index: step
    STEP = 3  # index: step; everything torch draws within it (stochastic depth)
    INIT = 4  # index: 0; initial weights


def stream(seed: int, kind: Kind, index: int) -> np.random.Generator:
    """The generator of one decision; `seed` and `index` up to 2**64 - 1."""
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, int(kind)]))


def torch_seed(seed: int, kind: Kind, index: int) -> int:
    """A seed for torch's generators from the same scheme."""
    return int(stream(seed, kind, index).integers(2**63))
