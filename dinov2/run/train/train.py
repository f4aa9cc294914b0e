"""Pretraining as a SLURM job.

    python dinov2/run/train/train.py --nodes 1 --ngpus 4 --partition P --timeout MINUTES [flags and overrides of train3d.py]

The job saves and is queued again when its time is up or it is preempted, until the training is done.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, BadInput
from dinov2.logging import setup_logging
from dinov2.run.submit import Program, add_cluster_arguments, submit
from dinov2.train.train3d import get_args_parser

logger = logging.getLogger("dinov2.run.train")


def main(argv: Sequence[str] | None = None) -> int:
    """Check the arguments here, before the job waits in a queue; then submit it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cluster = argparse.ArgumentParser("train.py", description=__doc__, epilog=get_args_parser().format_help())
    cluster.formatter_class = argparse.RawDescriptionHelpFormatter
    add_cluster_arguments(cluster)
    args, rest = cluster.parse_known_args(argv)
    train_args = get_args_parser().parse_intermixed_args(rest)
    setup_logging()
    try:
        if not train_args.output_dir:
            raise BadInput("--output-dir is needed: the job's logs and checkpoints go there")
        job = submit(Program("dinov2.train.train3d", rest), args, Path(train_args.output_dir).absolute() / "slurm")
    except BadInput as err:
        logger.error("%s", err)
        return EXIT_BAD_INPUT
    logger.info("submitted job %s; its log: %s", job, Path(train_args.output_dir) / "slurm" / f"{job}_0_log.err")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
