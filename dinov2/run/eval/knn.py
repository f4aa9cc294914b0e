"""Weighted kNN of features as a SLURM job.

    python dinov2/run/eval/knn.py --nodes 1 --ngpus 1 --partition P --timeout MINUTES [flags of knn.py]

A job that is queued again starts over; the cases that it had prepared are kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.eval.knn import get_args_parser
from dinov2.run.submit import launch


def main(argv: Sequence[str] | None = None) -> int:
    return launch("dinov2.eval.knn", get_args_parser(), argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
