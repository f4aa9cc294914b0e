"""Linear probing as a SLURM job.

    python dinov2/run/eval/linear.py --nodes 1 --ngpus 1 --partition P --timeout MINUTES [flags of linear3d.py]

The job saves and is queued again when its time is up or it is preempted, until the test is done.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.eval.linear3d import get_args_parser
from dinov2.run.submit import launch


def main(argv: Sequence[str] | None = None) -> int:
    return launch("dinov2.eval.linear3d", get_args_parser(), argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
