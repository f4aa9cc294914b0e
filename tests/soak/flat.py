"""Memory of a training over many steps: resident bytes of its processes as it goes, and a line through them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from tests.conftest import ROOT, SMALL
from tests.processes import environment
from tests.soak.hardships import METRICS, children_of
from tests.soak.jobs import lines_of

LOG_PERIOD = 10  # steps a line of metrics
SAMPLE_S = 0.1
WARM_UP = 0.2  # of the steps: libraries make what they keep, the allocator finds its size
BLOCKS = 16  # that samples are averaged over, because neighbouring ones are nearly the same
BOUND_KIB = 256.0  # a 1,000 steps: half of what one small tensor kept a step comes to; 32 MiB over the paper's 125,000 steps
TINIEST = [
    "student.embed_dim=12", "student.depth=1", "crops.global_crops_size=8", "crops.local_crops_size=8",
    "crops.local_crops_number=1", "train.batch_size_per_gpu=2", "train.num_workers=1", "optim.epochs=10",
    "train.checkpoint_period=500",
]  # fmt: skip


class Slope(NamedTuple):
    """KiB a 1,000 steps, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_flat(self) -> bool:
        """Whether growth beyond the bound is ruled out."""
        return self.high <= BOUND_KIB

    def __str__(self) -> str:
        return f"{self.value:+.1f} KiB a 1,000 steps, 95 % interval {self.low:+.1f} to {self.high:+.1f}"


def fit_slope(steps: Sequence[float], nbytes: Sequence[float], total_steps: int) -> Slope:
    """A straight line through what was sampled after the warm-up, in blocks of steps."""
    x, y = np.asarray(steps) / 1000, np.asarray(nbytes) / 1024
    edges = np.linspace(WARM_UP * total_steps, total_steps, BLOCKS + 1) / 1000
    block = np.digitize(x, edges)
    means = np.array([(x[block == b].mean(), y[block == b].mean()) for b in range(1, BLOCKS + 1) if (block == b).any()])
    line = stats.linregress(means[:, 0], means[:, 1])
    half = float(stats.t.ppf(0.975, len(means) - 2) * line.stderr)
    return Slope(float(line.slope), float(line.slope) - half, float(line.slope) + half)


def sample_training(data: Path, out: Path, steps: int) -> dict[str, list[tuple[float, float]]]:
    """(step, resident bytes) of the main process and of each loader process of a training, until it ends."""
    own = [
        f"train.OFFICIAL_EPOCH_LENGTH={steps // 10}",
        f"train.log_period={LOG_PERIOD}",
        f"train.dataset_path={data / 'few.json'}",
    ]
    words = [sys.executable, "-m", "dinov2", "train", "--output-dir", str(out), *SMALL, *TINIEST, *own]
    count, samples = lines_of(METRICS), dict[str, list[tuple[float, float]]]()
    with (out.parent / "flat.log").open("wb") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=environment("flat"), stdout=log, stderr=log)
        while process.poll() is None:
            step = count(out) * LOG_PERIOD
            if step:
                pids = {"main process": process.pid}
                pids |= {f"loader process {i}": pid for i, pid in enumerate(children_of(process.pid))}
                for name, pid in pids.items():
                    if nbytes := resident(pid):
                        samples.setdefault(name, []).append((step, nbytes))
            time.sleep(SAMPLE_S)
    if process.returncode:
        raise RuntimeError((out.parent / "flat.log").read_text(errors="replace")[-2000:])
    return samples


def resident(pid: int) -> int:
    """Bytes of a process in memory, without pages of files, which the system drops as it likes; 0 where it has ended."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem") if name in lines)
