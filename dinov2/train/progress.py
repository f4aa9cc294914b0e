"""How fast a run goes: step and data times, throughput, utilisation, memory, time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from dinov2.distributed.runtime import Runtime
from dinov2.logging.progress import in_words
from dinov2.train.cores import Cores


class Progress:
    """Timings since the last report.

    Args:
        runtime: Device whose memory and rate are reported.
        volumes_per_step: Effective batch.
        dtype: Compute dtype, for the rate that utilisation refers to.
    """

    def __init__(self, runtime: Runtime, volumes_per_step: int, dtype: torch.dtype) -> None:
        self.runtime = runtime
        self.volumes_per_step = volumes_per_step
        self.peak_flops = runtime.matmul_flops_per_s(dtype)
        self.flops_per_step = 0  # of `step_flops`, once a batch is there
        self._steps, self._waited, self._cores = 0, 0.0, Cores()
        self._since = self._began = time.perf_counter()
        self._all_steps = 0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training, so that no timing counts it."""
        self.runtime.synchronize()
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def step_done(self) -> None:
        self._steps, self._all_steps = self._steps + 1, self._all_steps + 1

    def report(self) -> dict[str, float]:
        """Means over the steps since the last report: `iter_time`, `data_time` (s), `volumes_per_s`, `data_wait`
        (share), `mfu` (model flops over the measured matrix-product rate), `memory_gib`; `cpu_wait`, `cpu_used` of `Cores`."""
        self.runtime.synchronize()
        now = time.perf_counter()
        iter_time = (now - self._since) / max(self._steps, 1)
        data_time = self._waited / max(self._steps, 1)
        self._steps, self._waited, self._since = 0, 0.0, now
        return {
            "iter_time": iter_time,
            "data_time": data_time,
            "volumes_per_s": self.volumes_per_step / iter_time,
            "data_wait": data_time / iter_time,
            "mfu": self.flops_per_step / iter_time / self.peak_flops,
            "memory_gib": self.runtime.peak_memory_gib(),
            **self._cores.report(),
        }

    def summary(self) -> str:
        """What this start of the run took, for its last line: device-hours of all ranks, volumes a second, waiting included."""
        elapsed = time.perf_counter() - self._began
        ranks, kind = self.runtime.world_size, "GPU" if self.runtime.device.type == "cuda" else "CPU process"
        hours, rate = elapsed * ranks / 3600, self._all_steps * self.volumes_per_step / elapsed
        took = f"{hours:.{1 if hours >= 10 else 3}f} {kind}-hours ({in_words(elapsed)} on {ranks})"
        return f"{took} for {self._all_steps} iterations: {rate:.1f} volumes/s"


def progress_line(iteration: int, total: int, m: dict[str, float]) -> str:
    """One line a person reads while waiting."""
    left = timedelta(seconds=round((total - iteration - 1) * m["iter_time"]))
    return (
        f"[{iteration + 1}/{total}] loss {m['total_loss']:.3f} ({_objective(m)}, cosine {m['mean_cosine']:.2f} | "
        f"{m['iter_time']:.2f} s/step, {m['volumes_per_s']:.1f} volumes/s, data wait {m['data_wait']:.0%}, mfu {m['mfu']:.0%}, "
        f"{m['memory_gib']:.1f} GiB | ETA {left}"
    )


def _objective(m: dict[str, float]) -> str:
    """What an objective's own terms and monitors say."""
    if "rotation_loss" in m:
        return (
            f"rotation {m['rotation_loss']:.3f}, contrast {m['contrastive_loss']:.3f} nats, reconstruction "
            f"{m['reconstruction_loss']:.3f}) lr {m['lr']:.2e} | rotations told {m['rotation_accuracy']:.0%}, rank "
            f"{m['feature_rank']:.1f}"
        )
    return (
        f"dino {m['dino_cross_entropy']:.3f}, ibot {m['ibot_cross_entropy']:.3f} nats) lr {m['lr']:.2e} | teacher entropy "
        f"{m['teacher_entropy']:.2f}, prototypes {m['prototypes_used']:.0f}"
    )
