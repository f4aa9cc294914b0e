"""Whether a process gets the cores that it asks for, as Linux counts it; elsewhere nothing is said."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


class Cores:
    """Shares since the last report. A row of metrics has them, `watching.py` judges them.

    With several ranks on a machine each is held against its part of the cores (torchrun's LOCAL_WORLD_SIZE).
    """

    def __init__(self) -> None:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._cores = max(1.0, len(os.sched_getaffinity(0)) / ranks_here) if hasattr(os, "sched_getaffinity") else 1.0
        self._before = self._count()

    def report(self) -> dict[str, float]:
        """Numbers of a row; none where the system does not count them.

        Returns:
            `cpu_wait`: share of the time in which the process's main thread could have run and no core was free; `cpu_used`:
            what the process and its loader processes took of the cores' time.
        """
        now = self._count()
        before, self._before = self._before, now
        if now is None or before is None or now[0] <= before[0]:
            return {}
        elapsed, waited, used = (b - a for a, b in zip(before, now, strict=True))
        return {"cpu_wait": waited / elapsed, "cpu_used": max(0.0, used) / elapsed / self._cores}

    def _count(self) -> tuple[float, float, float] | None:
        """Clock, seconds in the queue for a core, seconds on cores."""
        try:
            queued = int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return None
        pids = [p.pid for p in multiprocessing.active_children() if p.pid is not None]
        return time.perf_counter(), queued, time.process_time() + sum(_seconds(pid) for pid in pids)


def _seconds(pid: int) -> float:
    """Processor time of a process, 0 where it has ended."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(values[11]) + int(values[12])) / _TICKS
