"""The one place that chooses the device and knows this process's place among the ranks."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass

import torch

from dinov2.errors import BadInput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """Where this process computes."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    def peak_memory_gib(self) -> float:
        """Most memory used so far: of the device on CUDA, of the process elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        import resource  # not on every platform

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def matmul_flops_per_s(self, dtype: torch.dtype) -> float:
        """Rate of a large matrix product in `dtype`, measured now: what utilisation is a share of."""
        n = 8192 if self.device.type == "cuda" else 1024
        a = torch.ones(n, n, device=self.device, dtype=dtype)
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            a @ a
            self.synchronize()
            best = min(best, time.perf_counter() - start)
        return 2.0 * n**3 / best

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def start_runtime(num_threads: int | None = None) -> Runtime:
    """CUDA where there is one, otherwise the CPU.

    Args:
        num_threads: CPU threads of this process; None leaves torch's choice. Sums depend on it in their last bits.

    Raises:
        BadInput: Started with several ranks, which the training loop does not do yet.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("WORLD_SIZE > 1: training on several ranks is not built yet; start one process")
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    index = int(os.environ.get("LOCAL_RANK", "0"))
    return Runtime(torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu"))
