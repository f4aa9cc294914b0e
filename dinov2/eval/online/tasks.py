"""The evaluators of `evaluation.tasks`: a row of `KINDS` each, opened and checked before training starts.

They learn from the training part of a labelled list and are scored on its validation part; the test part is never looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from dinov2.data.corpus.overlap import warn_of_listed
from dinov2.data.datalist import Datalist, Entry
from dinov2.distributed import is_main_process
from dinov2.errors import BadInput
from dinov2.eval.online.knn import NearestNeighbours
from dinov2.eval.online.labelled import PARTS, Labelled, open_labelled
from dinov2.eval.online.linear import LinearProbe
from dinov2.eval.online.readout import ReadOut
from dinov2.eval.online.retrieval import Retrieval
from dinov2.train.evaluation import Evaluator

KINDS: dict[str, Callable[[Labelled], Evaluator]] = {
    "knn": NearestNeighbours,
    "linear": LinearProbe,
    "readout": ReadOut,
    "retrieval": Retrieval,
}


def open_tasks(cfg: DictConfig, datalist: Datalist, output_dir: Path) -> Sequence[Evaluator]:
    """An evaluator for each entry of `evaluation.tasks`; scans that the network learns from too are warned of.

    Args:
        cfg: The run's; prepared cases are kept in `train.cache_dir`, without one below the run's folder.
        datalist: Of the pretraining.
        output_dir: Of the run.

    Raises:
        BadInput: What of a task cannot be used, with its name.
    """
    evaluators: list[Evaluator] = []
    for task in cfg.evaluation.tasks:
        try:
            labelled = open_labelled(task, cfg, output_dir)
            evaluators.append(KINDS[task.kind](labelled))
        except BadInput as err:
            raise BadInput(f"evaluation.tasks, {task.name or f'{task.kind} of {task.dataset}'}: {err}") from err
        if labelled.name in [one.name for one in evaluators[:-1]]:
            raise BadInput(f"evaluation.tasks: two tasks are called {labelled.name}: give one of them another name")
        if is_main_process():
            warn_of_listed(_scans(labelled), datalist.entries, f"evaluation.tasks, {labelled.name}")
    return evaluators


def _scans(labelled: Labelled) -> list[Entry]:
    return [Entry(path, ()) for part in PARTS for item in labelled.cases[part].items for path in item.images]
