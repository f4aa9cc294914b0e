"""What a step tells the host: whether it was finite, on any rank, and whether any rank was asked to stop. Nobody waits for it.

The update of a step that is not finite is left out on the device. Its flags cross the ranks in one exchange and reach the host
while it prepares the next step, so that the device always has work.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2.distributed import all_reduce_max


class StepFlags(NamedTuple):
    """A finished step as the host knows it.

    names: its volumes; `is_bad_here` and `is_bad`: not finite on this rank, on any; `stop`: any rank was asked to stop.
    """

    iteration: int
    names: list[str]
    is_bad_here: bool
    is_bad: bool
    stop: bool


class FlagExchange:
    """Flags of steps in flight.

    Args:
        lag: Steps that the host runs ahead of what it reads: 1 on a GPU; 0 reads at once, where the device is the host.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._in_flight: deque[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = deque()

    def post(self, iteration: int, names: list[str], is_bad: Tensor, stop: bool) -> Tensor:
        """Exchange a step's flags between ranks; the result, whether any rank was not finite, stays on the device.

        Args:
            iteration: The step's.
            names: Its volumes on this rank.
            is_bad: Bool scalar on the device.
            stop: Whether this rank was asked to stop.
        """
        own = is_bad.float()
        any_rank = all_reduce_max(torch.stack([own, torch.full_like(own, float(stop))]))  # [2]
        found = torch.cat([own[None], any_rank])
        event = None
        if found.is_cuda:
            found = torch.empty(3, pin_memory=True).copy_(found, non_blocking=True)
            event = torch.cuda.current_stream().record_event()
        self._in_flight.append((iteration, names, found, event))
        return any_rank[0]

    def arrived(self, drain: bool = False) -> list[StepFlags]:
        """Steps that the host reads now, oldest first: those more than `lag` back, or all; the same ones on every rank."""
        read = []
        while len(self._in_flight) > (0 if drain else self.lag):
            iteration, names, found, event = self._in_flight.popleft()
            if event is not None:
                event.synchronize()
            own, is_bad, stop = (bool(v) for v in found.tolist())
            read.append(StepFlags(iteration, names, own, is_bad, stop))
        return read
