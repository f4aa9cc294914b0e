"""What a run says when something goes wrong, and when it ends: to its log, to `warnings.json`, to `train.notify`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from omegaconf import DictConfig

from dinov2.configs.schema import notify_words
from dinov2.distributed import gather_objects, is_main_process
from dinov2.distributed.runtime import Runtime
from dinov2.errors import EXIT_COLLAPSED, EXIT_OK, EXIT_RESUMABLE
from dinov2.logging.ending import ENDING_COLLAPSED, ENDING_DONE, ENDING_STOPPED
from dinov2.logging.metrics import METRICS_FILE, read_metrics
from dinov2.logging.notify import Notifier
from dinov2.logging.warned import WarningFile
from dinov2.train.progress import Progress
from dinov2.train.watching import Facts, Row, Watcher

logger = logging.getLogger(__name__)


class Alerts:
    """Watches the rows of a run on its main rank; the others are silent.

    What the rows before `first` led to is worked out from them again: a warning that a kill kept from the file is said now, and
    none twice.

    Args:
        cfg: A merged configuration.
        output_dir: Folder of the run, whose metrics end before `first`.
        first: Iteration that the run goes on with.
        runtime: Its ranks.
    """

    def __init__(self, cfg: DictConfig, output_dir: Path, first: int, runtime: Runtime) -> None:
        self._stops = cfg.train.stop_on_collapse
        self._notifier = Notifier(notify_words(cfg.train.notify) if is_main_process() else [], output_dir)
        self._file: WarningFile | None = None
        self._watcher = Watcher(Facts.of(cfg, runtime.world_size))
        if is_main_process():
            self._file = WarningFile(output_dir, first)
            for row in read_metrics(output_dir / METRICS_FILE):
                if row["iteration"] < first:
                    self.see(row)

    def see(self, row: Row) -> None:
        """Say what begins with a row."""
        if self._file is None:
            return
        for said in self._watcher.see(row):
            if self._file.add(said._asdict()):
                logger.warning("iteration %d, %s: %s", said.iteration, said.name, said.message)
                self._notifier.tell("warning", f"{said.name}: {said.message}")

    def is_to_stop(self) -> bool:
        """Whether `train.stop_on_collapse` ends the run here; all ranks ask, after the same row."""
        return self._stops and any(gather_objects(self._watcher.collapsed))

    def done(self, progress: Progress, teacher: Path) -> int:
        """The last lines of a run, here and below; each gives the exit code."""
        return self._end(progress, "end", logging.INFO, f"{ENDING_DONE} {teacher}", EXIT_OK)

    def stopped(self, progress: Progress, iteration: int, signals: Sequence[str]) -> int:
        """`signals`: names of those that this process has received; none where another rank has."""
        why = signals[0] if signals else "another rank's signal"
        line = f"{ENDING_STOPPED} {iteration} on {why}; start the same command again to continue"
        return self._end(progress, "stop", logging.INFO, line, EXIT_RESUMABLE)

    def collapsed(self, progress: Progress, iteration: int) -> int:
        line = f"{ENDING_COLLAPSED} {iteration} (train.stop_on_collapse): the warnings above say what to change; it is saved"
        return self._end(progress, "stop", logging.ERROR, line, EXIT_COLLAPSED)

    def _end(self, progress: Progress, event: str, level: int, line: str, code: int) -> int:
        if self._file is not None:
            logger.info("%s", progress.summary())
            logger.log(level, "%s", line)
            self._notifier.tell(event, line)
        return code

    def __enter__(self) -> Alerts:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        if err is not None:
            self._notifier.tell("failed", " ".join(str(err).split()) or type(err).__name__)
        self._notifier.close()
