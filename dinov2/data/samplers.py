"""Which volume comes at which position of the endless sample sequence, and which positions a rank takes at a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import numpy as np

from dinov2.streams import Kind, stream


class EndlessOrder:
    """Position -> index: a new shuffle of all entries every epoch, each from its own stream."""

    def __init__(self, num_entries: int, seed: int) -> None:
        self.num_entries = num_entries
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: stream(seed, Kind.ORDER, epoch).permutation(num_entries).astype(np.int64)
        )

    def __call__(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_entries)
        return int(self._permutation(epoch)[offset])


@dataclass(frozen=True)
class PositionSampler:
    """Batch sampler: endless lists of positions, one per micro-batch of this rank, from a step on.

    Of the effective batch of B = batch_size * world_size * accumulation_steps volumes of a step, rank r holds
    [r*B/W, (r+1)*B/W), and passes them in micro-batches of `batch_size`.
    """

    batch_size: int
    accumulation_steps: int
    rank: int
    world_size: int
    start_step: int

    @property
    def effective_batch(self) -> int:
        return self.batch_size * self.accumulation_steps * self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        per_rank = self.batch_size * self.accumulation_steps
        for step in count(self.start_step):
            first = step * self.effective_batch + self.rank * per_rank
            for start in range(first, first + per_rank, self.batch_size):
                yield list(range(start, start + self.batch_size))
