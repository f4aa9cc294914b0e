"""Online evaluation as the loop knows it: evaluators that were handed in, the teacher that they see, rows, the best teacher.

Which evaluators there are is no business of the loop's (`dinov2/run/train/pretrain.py` hands them in).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig

from dinov2.data import Datalist
from dinov2.distributed import is_main_process, while_others_wait
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.files import is_number, read_json, write_json
from dinov2.fsdp.tensors import whole
from dinov2.layers.attention import resolve_attention
from dinov2.logging import MetricWriter
from dinov2.models import DinoVisionTransformer3d, build_backbone
from dinov2.train.meta_arch import MetaArch
from dinov2.train.progress import Progress
from dinov2.train.state import save_teacher

logger = logging.getLogger(__name__)

UNTRAINED = -1  # the iteration of the row before the first step
_SET_ASIDE = (BadInput, OSError, torch.OutOfMemoryError)  # what ends one measurement and no run


class Evaluator(Protocol):
    """Something that says in numbers how good a frozen network is, without touching any state of the training.

    Attributes:
        metrics: Names of the numbers, and whether higher is better.
    """

    name: str

    @property
    def metrics(self) -> Mapping[str, bool]: ...

    def __call__(self, backbone: DinoVisionTransformer3d, alive: Callable[[], None]) -> dict[str, float]:
        """The numbers by name.

        Args:
            backbone: In evaluation mode, on its device.
            alive: Called now and then by what takes long.

        Raises:
            BadInput: A file cannot be used, or features are not finite.
        """


OpenEvaluators = Callable[[DictConfig, Datalist, Path], Sequence[Evaluator]]


def open_evaluation(
    open_evaluators: OpenEvaluators | None, cfg: DictConfig, datalist: Datalist, runtime: Runtime, output_dir: Path
) -> OnlineEvaluation:
    """What `evaluation.tasks` and `train.keep_best` ask for.

    Raises:
        BadInput: A task cannot be used, or the best is to be kept by what none measures.
    """
    evaluators: Sequence[Evaluator] = []
    if cfg.evaluation.tasks:
        if open_evaluators is None:
            what = "evaluation.tasks: whoever called dinov2.train.train3d.main handed no evaluators in"
            raise BadInput(f"{what}: call dinov2.run.train.pretrain.main with the same words")
        evaluators = open_evaluators(cfg, datalist, output_dir)
    evaluation = OnlineEvaluation(evaluators, cfg, runtime, output_dir)
    known, wanted = evaluation.is_higher_better, cfg.train.keep_best
    if wanted and wanted not in known:
        there = f"is none of {', '.join(known)}" if known else "needs evaluation.tasks, and there are none"
        raise BadInput(f"train.keep_best={wanted} {there}: name one, or leave it empty")
    return evaluation


class OnlineEvaluation:
    """Measures the teacher now and then, and keeps the best one.

    The main rank measures, on a network of its own with the teacher's weights: the one that is trained keeps its mode, its
    compiled blocks and its shards, and no random number is drawn from a generator of the training's.

    Args:
        evaluators: None: nothing is ever due.
        cfg: The run's.
        runtime: This rank.
        output_dir: Of the run.
    """

    def __init__(self, evaluators: Sequence[Evaluator], cfg: DictConfig, runtime: Runtime, output_dir: Path) -> None:
        self.evaluators = evaluators
        self.cfg, self.runtime = cfg, runtime
        period = cfg.evaluation.tasks_period_iterations
        self.period = cfg.evaluation.eval_period_iterations if period is None else period
        self.is_higher_better = {f"{one.name}/{metric}": up for one in evaluators for metric, up in one.metrics.items()}
        self.best_file = output_dir / "eval" / "best" / "best.json"
        self._began, self._spent_s = time.perf_counter(), 0.0

    def is_due(self, iteration: int, total: int) -> bool:
        """Whether it measures after an iteration: before the first one, every period, and at the end."""
        periodic = self.period > 0 and (iteration + 1) % self.period == 0
        return bool(self.evaluators) and (periodic or iteration in (UNTRAINED, total - 1))

    def visit(
        self, iteration: int, total: int, model: MetaArch, metrics: MetricWriter, data: dict[str, Any], progress: Progress
    ) -> None:
        """`measure`, where it is due; no timing of the progress counts it."""
        if self.is_due(iteration, total):
            with progress.paused():
                self.measure(iteration, model, metrics, data)

    def measure(self, iteration: int, model: MetaArch, metrics: MetricWriter, data: dict[str, Any]) -> None:
        """Write the row of an iteration, and the teacher where it is the best so far; all ranks call it.

        Args:
            data: Of `data_record`.

        Raises:
            BadInput: A task cannot be used and no step has been made yet; later that is said, and the others are measured.
        """
        start = time.perf_counter()
        backbone = _teacher_alone(model, self.cfg, self.runtime)
        row, is_best = while_others_wait(lambda alive: self._row(iteration, backbone, alive))
        metrics.write_evaluation(row)
        if is_best:
            self._keep(iteration, model, row, data)
        now = time.perf_counter()
        self._spent_s += now - start
        shown = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "iteration")
        when = "before the first iteration" if iteration == UNTRAINED else f"after iteration {iteration}"
        share = self._spent_s / (now - self._began)
        logger.info("evaluated %s: %s (%.1f s; %.1f %% of the run so far)", when, shown or "nothing", now - start, 100 * share)

    def _row(
        self, iteration: int, backbone: DinoVisionTransformer3d | None, alive: Callable[[], None]
    ) -> tuple[dict[str, float], bool]:
        """What all evaluators say, and whether that is the best so far; on the main rank."""
        assert backbone is not None
        row: dict[str, float] = {"iteration": iteration}
        for one in self.evaluators:
            alive()
            try:
                row |= {f"{one.name}/{metric}": value for metric, value in one(backbone, alive).items()}
            except _SET_ASIDE as err:
                if iteration == UNTRAINED:
                    raise
                reason = str(err).splitlines()[0]
                logger.warning("%s was not measured after iteration %d: %s", one.name, iteration, reason)
        return row, self._is_best(row)

    def _is_best(self, row: dict[str, float]) -> bool:
        """Whether a row has the best value yet; a run that begins anew has none before."""
        wanted = self.cfg.train.keep_best
        if row["iteration"] == UNTRAINED:
            self.best_file.unlink(missing_ok=True)
        if row["iteration"] == UNTRAINED or not is_number(row.get(wanted)):
            return False
        before = self._best_value()
        return before is None or (row[wanted] > before if self.is_higher_better[wanted] else row[wanted] < before)

    def _best_value(self) -> float | None:
        """Of the teacher that is kept; None where there is none, or one that was kept for something else."""
        if not self.best_file.exists():
            return None
        record = read_json(self.best_file, remedy="remove it, and the next measurement counts as the best")
        is_ours = isinstance(record, dict) and record.get("measured") == self.cfg.train.keep_best
        return float(record["value"]) if is_ours and is_number(record.get("value")) else None

    def _keep(self, iteration: int, model: MetaArch, row: dict[str, float], data: dict[str, Any]) -> None:
        """Write the teacher, then what it is; a kill between the two writes both again, as no checkpoint is later."""
        wanted = self.cfg.train.keep_best
        path = save_teacher(model, self.cfg, self.best_file.parent, iteration, data)
        if is_main_process():
            write_json(self.best_file, {"measured": wanted, "value": row[wanted], "iteration": iteration, "teacher": path.name})
            logger.info("the best teacher so far by %s: %s", wanted, path)


def _teacher_alone(model: MetaArch, cfg: DictConfig, runtime: Runtime) -> DinoVisionTransformer3d | None:
    """A network of its own with the weights of the teacher's backbone, unsharded and not compiled; all ranks call it.

    Where they are whole it shares their memory. On the main rank; None on the others.
    """
    weights = {k: whole(v.detach()) for k, v in model.teacher.backbone.state_dict().items()}  # a collective where sharded
    if not is_main_process():
        return None
    weights = {k: v.float() if v.dtype == torch.float64 else v for k, v in weights.items()}  # as what is shown to it
    attention = resolve_attention(cfg.student.attention, runtime.device.type)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone = build_backbone(cfg, teacher=True, attention=attention)
    backbone.load_state_dict(weights, assign=True)
    return backbone.eval().requires_grad_(False)
