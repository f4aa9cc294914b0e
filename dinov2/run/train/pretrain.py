"""Pretraining with all that it is told by its configuration: the trainer, and the evaluators of `evaluation.tasks`.

`dinov2 train`, `python dinov2/train/train3d.py` and the SLURM launcher start here, because training knows no evaluation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from dinov2.data import Datalist
from dinov2.train import train3d
from dinov2.train.evaluation import Evaluator
from dinov2.train.train3d import get_args_parser

__all__ = ["get_args_parser", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """`train3d.main`, with evaluators."""
    return train3d.main(argv, open_evaluators)


def open_evaluators(cfg: DictConfig, datalist: Datalist, output_dir: Path) -> Sequence[Evaluator]:
    """As `open_tasks`, which is imported where a run asks for tasks."""
    from dinov2.eval.online.tasks import open_tasks

    return open_tasks(cfg, datalist, output_dir)


if __name__ == "__main__":
    sys.exit(main())
