"""DINOv2's metric logger for loops of one's own; a training run writes through `MetricWriter` and `train/progress.py`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from dinov2.files import to_json

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Meter:
    """The last value of a metric, and what its mean is made of."""

    value: float = 0.0
    total: float = 0.0
    count: int = 0

    @property
    def global_avg(self) -> float:
        return self.total / max(self.count, 1)

    def update(self, value: float, num: int = 1) -> None:
        self.value, self.total, self.count = value, self.total + value * num, self.count + num


class MetricLogger:
    """Says and writes what a loop hands to `update`, every so many of its steps; the values are those of the step.

    Args:
        delimiter: Between the metrics of a line in the log.
        output_file: Gets a JSON object a line, with `iteration`, `iter_time` and `data_time`, on the main rank; None: no file.
    """

    def __init__(self, delimiter: str = "\t", output_file: str | None = None) -> None:
        self.delimiter, self.output_file = delimiter, output_file
        self.meters: dict[str, Meter] = {}

    def update(self, **metrics: Any) -> None:
        """Numbers or tensors of one element, by name."""
        for name, value in metrics.items():
            self.meters.setdefault(name, Meter()).update(float(value))

    def log_every(
        self,
        iterable: Iterable[T],
        print_freq: int,
        header: str | None = None,
        n_iterations: int | None = None,
        start_iteration: int = 0,
    ) -> Iterator[T]:
        """The items, up to iteration `n_iterations` (None: all, of something that has a length)."""
        total = len(iterable) if n_iterations is None else n_iterations  # type: ignore[arg-type]  # as the docstring says
        before = time.perf_counter()
        for i, item in zip(range(start_iteration, total), iterable, strict=False):
            data_time = time.perf_counter() - before
            yield item
            iter_time, before = time.perf_counter() - before, time.perf_counter()
            if i % print_freq == 0 or i == total - 1:
                logger.info("%s [%d/%d] %s", header or "", i, total, self)
                self._write({"iteration": i, "iter_time": iter_time, "data_time": data_time})

    def _write(self, row: dict[str, float]) -> None:
        from dinov2.distributed import is_main_process  # here, as below: it brings torch along

        if self.output_file is not None and is_main_process():
            with open(self.output_file, "a", encoding="utf-8") as file:
                file.write(to_json(row | {name: meter.value for name, meter in self.meters.items()}) + "\n")

    def synchronize_between_processes(self) -> None:
        """Make each mean that of all ranks, which have the same metrics."""
        from dinov2.distributed import gather_objects

        for meter in self.meters.values():
            totals, counts = zip(*gather_objects((meter.total, meter.count)), strict=True)
            meter.total, meter.count = sum(totals), sum(counts)

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter.value:.4f} ({meter.global_avg:.4f})" for name, meter in self.meters.items())
