"""`dinov2 embed` as a SLURM array: a job per shard, then one that sees to the table.

    python dinov2/run/eval/embed.py --shards 8 --gpus 1 --partition P list.json --weights W --output feats.parquet [flags]

The flags are those of `dinov2 embed`. A job that is preempted or runs out of time is queued again and goes on.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.cli import build_parser
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, BadInput
from dinov2.logging import setup_logging
from dinov2.run.submit import Job, Program, add_job_arguments, job_words, submit_array

logger = logging.getLogger("dinov2.run.eval")


def shard_commands(rest: list[str], num_shards: int, cpus: int) -> tuple[list[list[str]], list[str], Path]:
    """The arguments of `dinov2` for each shard and for the job after them, and the folder of logs.

    Raises:
        BadInput: The flags name a shard, or a folder instead of a list.
    """
    args = build_parser().parse_args(["embed", *rest])
    if args.shard != "1/1":
        raise BadInput("--shard is what this program adds: leave it out")
    if not args.source.is_file():
        raise BadInput(f"{args.source}: no such list; a folder is first made a list of, by `dinov2 index`")
    last = ["embed", *rest, "--workers", str(cpus)]  # of a flag given twice the second counts
    shards = [[*last, "--shard", f"{i}/{num_shards}"] for i in range(1, num_shards + 1)]
    return shards, last, args.output.absolute().with_name(args.output.name.removesuffix(".parquet") + ".jobs")


def main(argv: Sequence[str] | None = None) -> int:
    """Check the arguments here, before the jobs wait in a queue; then submit them."""
    cluster = argparse.ArgumentParser("embed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cluster.add_argument("--shards", type=int, required=True, help="jobs")
    cluster.add_argument("--gpus", type=int, default=0, help="per job; 0: none")
    add_job_arguments(cluster, job_name="dinov2-embed", timeout=720)
    setup_logging()
    try:
        args, rest = cluster.parse_known_args(job_words(argv))
        if args.shards < 1:
            raise BadInput(f"--shards {args.shards}: at least 1")
        shards, last, folder = shard_commands(rest, args.shards, args.cpus_per_task)
        programs = [Program("dinov2.cli", command) for command in shards]
        jobs = submit_array(programs, Program("dinov2.cli", last), Job.asked_for(args), folder, args.gpus)
    except BadInput as err:
        logger.error("%s", err)
        return EXIT_BAD_INPUT
    logger.info("submitted %s; logs: %s; the last job to end writes the table", ", ".join(jobs), folder)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
