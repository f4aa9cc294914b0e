"""A study as a SLURM array: a job for each cell that is not finished, then one that writes the tables.

    python dinov2/run/eval/study.py --gpus-per-cell 1 --partition P --timeout MINUTES STUDY [key=value ...]

A job that is preempted or runs out of time is queued again and its cell goes on. The same command submits what is left.
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
from dinov2.eval.study import records
from dinov2.eval.study.cells import cells_of, labelled_sets
from dinov2.eval.study.plan import problems_of
from dinov2.eval.study.schema import load_study
from dinov2.logging import setup_logging
from dinov2.run.submit import Job, Program, add_job_arguments, job_words, submit_array

logger = logging.getLogger("dinov2.run.eval")


def cell_commands(words: list[str]) -> tuple[list[list[str]], list[str], Path]:
    """The arguments of `dinov2` for each cell that is left and for the job after them, and the folder of logs.

    Args:
        words: The study and its overrides.

    Raises:
        BadInput: Something is missing, cells ran before the study was changed, or none is left.
    """
    if not words or words[0].startswith("-") or any("=" not in word for word in words[1:]):
        raise BadInput("give the study, then key=value words: study.py [cluster's flags] STUDY base_data_dir=DATA")
    study = load_study(words[0], words[1:])
    sets = labelled_sets(study)
    cells = cells_of(study, sets)
    problems = problems_of(study, sets, cells)
    if problems:
        raise BadInput(f"{study.name}: {'; '.join(problems)} (`dinov2 study plan` says all)")
    records.refuse_changed(cells)
    left = [cell for cell in cells if records.state_of(cell).name != records.FINISHED]
    commands = [["study", "run", *words, "--cells", cell.name] for cell in left]
    return commands, ["study", "collect", *words], study.output.absolute() / "jobs"


def main(argv: Sequence[str] | None = None) -> int:
    """Check the study here, before the jobs wait in a queue; then submit them."""
    cluster = argparse.ArgumentParser("study.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cluster.add_argument("--gpus-per-cell", type=int, default=1, help="of each job; 0: none")
    add_job_arguments(cluster, job_name="dinov2-study", timeout=1440)
    setup_logging()
    try:
        args, rest = cluster.parse_known_args(job_words(argv))
        commands, last, folder = cell_commands(rest)
        if not commands:
            logger.info("all cells are finished: dinov2 %s", " ".join(last))
            return EXIT_OK
        programs = [Program("dinov2.cli", command) for command in commands]
        jobs = submit_array(programs, Program("dinov2.cli", last), Job.asked_for(args), folder, args.gpus_per_cell)
    except BadInput as err:
        logger.error("%s", err)
        return EXIT_BAD_INPUT
    logger.info("submitted %s; logs: %s; the last job writes the tables when all others have ended", ", ".join(jobs), folder)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
