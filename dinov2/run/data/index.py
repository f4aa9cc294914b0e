"""`dinov2 index` as a SLURM array: a job per shard, then one that merges them.

    python dinov2/run/data/index.py --shards 16 --partition P FOLDER... --output list.json [flags of `dinov2 index`]

A job that is preempted or runs out of time is queued again and goes on. The shards' lists lie in a folder beside the output.
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

logger = logging.getLogger("dinov2.run.data")

_OF_THE_WHOLE = ("--output", "--quarantine", "--report", "--workers")  # flags with a value that a shard has its own of


def shard_commands(rest: list[str], num_shards: int, cpus: int) -> tuple[list[list[str]], list[str]]:
    """The arguments of `dinov2` for each shard, and for the merge.

    Raises:
        BadInput: The flags already name a shard or a merge.
    """
    args = build_parser().parse_args(["index", *rest])
    if args.merge or args.shard != "1/1":
        raise BadInput("--shard and --merge are what this program adds: leave them out")
    folder = shard_folder(args.output)
    own = _without(rest, _OF_THE_WHOLE)
    parts = [folder / f"{i}of{num_shards}.json" for i in range(1, num_shards + 1)]
    shards = [
        ["index", *own, "--output", str(part), "--shard", f"{i}/{num_shards}", "--workers", str(cpus)]
        for i, part in enumerate(parts, 1)
    ]
    merge = ["index", "--merge", *map(str, parts), "--output", str(args.output.absolute())]
    merge += ["--min-axis", str(args.min_axis), "--max-nan", str(args.max_nan)]
    for flag, path in (("--quarantine", args.quarantine), ("--report", args.report)):
        merge += [flag, str(path.absolute())] if path else []
    return shards, merge


def shard_folder(output: Path) -> Path:
    """Where the shards' lists and the jobs' logs are."""
    return output.absolute().with_name(output.name.removesuffix(".json") + ".shards")


def _without(words: list[str], flags: tuple[str, ...]) -> list[str]:
    """Words without some flags and their values."""
    kept, skip = [], False
    for word in words:
        if skip or word.split("=")[0] in flags:
            skip = not skip and "=" not in word
            continue
        kept.append(word)
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    """Check the arguments here, before the jobs wait in a queue; then submit them."""
    cluster = argparse.ArgumentParser("index.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cluster.add_argument("--shards", type=int, required=True, help="jobs")
    add_job_arguments(cluster, job_name="dinov2-index", timeout=720)
    setup_logging()
    try:
        args, rest = cluster.parse_known_args(job_words(argv))
        if args.shards < 1:
            raise BadInput(f"--shards {args.shards}: at least 1")
        shards, merge = shard_commands(rest, args.shards, args.cpus_per_task)
        folder = shard_folder(Path(merge[merge.index("--output") + 1]))
        programs = [Program("dinov2.cli", command) for command in shards]
        jobs = submit_array(programs, Program("dinov2.cli", merge), Job.asked_for(args), folder)
    except BadInput as err:
        logger.error("%s", err)
        return EXIT_BAD_INPUT
    logger.info("submitted %s; logs and shards' lists: %s; the last job writes the list", ", ".join(jobs), folder)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
