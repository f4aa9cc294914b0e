"""The one place that chooses the device and knows this process's place among the ranks."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dinov2.errors import BadInput, LostRank

logger = logging.getLogger(__name__)

_SIGNS_OF_A_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Timed out waiting")


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


def start_runtime(num_threads: int | None = None, backend: str = "auto", timeout_s: float = 600.0) -> Runtime:
    """Device and place of this process; with several ranks (as torchrun or a launcher sets WORLD_SIZE) their process group.

    Args:
        num_threads: CPU threads of this process; None leaves torch's choice. Sums depend on it in their last bits.
        backend: `nccl` (CUDA), `gloo`, or `auto`: nccl where every rank has a GPU of its own, else gloo on the CPU.
        timeout_s: How long a rank waits for the others before it gives up.

    Raises:
        BadInput: nccl without a GPU for every rank, an address or port that cannot be used, or not all ranks came.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    world_size, rank, local_rank = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if backend == "nccl" and num_gpus < local_size:
        raise BadInput(f"train.backend=nccl: {local_size} ranks on this machine, {num_gpus} GPUs: use gloo, or a rank per GPU")
    use_cuda = num_gpus >= local_size and backend != "gloo" if world_size > 1 else num_gpus > 0
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        _join(device, world_size, rank, timeout_s)
    return Runtime(device, rank, world_size)


def _join(device: torch.device, world_size: int, rank: int, timeout_s: float) -> None:
    where = f"{os.environ.get('MASTER_ADDR', 'no MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 'no MASTER_PORT')}"
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    except (dist.DistError, ValueError, RuntimeError) as err:
        reason = str(err).splitlines()[0][:160]
        problem = f"rank {rank} of {world_size} could not join at {where} ({reason})"
        raise BadInput(f"{problem}: choose another --master-port") from err


@contextmanager
def lost_rank_explained(rank: int) -> Iterator[None]:
    """Turn what a collective raises when another rank has died into one line; that rank's own error says why.

    Raises:
        LostRank: Another rank is gone.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as err:
        if not dist.is_initialized() or not any(sign in str(err) for sign in _SIGNS_OF_A_LOST_RANK):
            raise
        raise LostRank(f"rank {rank}: another rank has ended; its own message says why") from err


def stop_runtime() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
