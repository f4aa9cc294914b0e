"""Pretraining as a SLURM job.

    python dinov2/run/train/train.py --nodes 1 --ngpus 4 --partition P --timeout MINUTES [flags and overrides of train3d.py]

The job saves and is queued again when its time is up or it is preempted, until the training is done.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.run.submit import launch
from dinov2.run.train.pretrain import get_args_parser


def main(argv: Sequence[str] | None = None) -> int:
    return launch("dinov2.run.train.pretrain", get_args_parser(), argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
