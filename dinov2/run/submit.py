"""Programs as SLURM jobs through submitit: one task a rank, requeued when the time is up or the job is preempted."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import os
import shutil
import subprocess
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_RESUMABLE, BadInput
from dinov2.files import words
from dinov2.logging import setup_logging
from dinov2.optional import needed_for

if TYPE_CHECKING:
    from submitit import AutoExecutor
    from submitit.helpers import DelayedSubmission

logger = logging.getLogger(__name__)

REQUEUE_WAIT_S = 600  # how long a task waits to be ended after it asked for its job to be queued again


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """DINOv2's flags for the cluster, in all its spellings."""
    group = add_job_arguments(parser)
    group.add_argument("--nodes", "--nnodes", type=int, default=1, help="machines")
    group.add_argument("--ngpus", "--gpus", "--gpus-per-node", type=int, default=4, help="GPUs, and so ranks, per machine")
    group.add_argument("--cpu", action="store_true", help="ranks on CPUs: --ngpus of them per machine, and no GPU asked for")
    group.add_argument("--use-volta32", action="store_true", help="accepted for old commands, no effect")


def add_job_arguments(
    parser: argparse.ArgumentParser, job_name: str = "dinov2", timeout: int = 2800
) -> argparse._ArgumentGroup:
    """The flags of any job."""
    group = parser.add_argument_group("cluster")
    group.add_argument("--cpus-per-task", type=int, default=8, help="cores per task, for its processes")
    group.add_argument("--mem", default="", help="memory per machine, as SLURM writes it (64G); default: the partition's")
    group.add_argument("--timeout", type=int, default=timeout, help="minutes until the job is saved and queued again")
    group.add_argument("--signal-delay", type=int, default=120, help="seconds before the end at which SLURM asks to save")
    group.add_argument("--partition", default="", help="SLURM partition; default: the cluster's")
    group.add_argument("--exclude", default="", help="machines to avoid")
    group.add_argument("--comment", default="", help="shown by squeue")
    group.add_argument("--job-name", default=job_name)
    return group


@dataclass(frozen=True)
class Job:
    """What a cluster is asked for: the flags of any job, by their names."""

    cpus_per_task: int
    mem: str
    timeout: int
    signal_delay: int
    partition: str
    exclude: str
    comment: str
    job_name: str

    @classmethod
    def asked_for(cls, args: argparse.Namespace) -> Job:
        """Of a command line with the flags of `add_job_arguments`."""
        return cls(**{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)})


def job_words(argv: Sequence[str] | None) -> list[str]:
    """The words of a launcher, as of `words`.

    Raises:
        BadInput: One has a line break or another control character, which would be a line of its own in the job's script.
    """
    given = words(argv)
    for word in given:
        if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in word):
            raise BadInput(f"{word!r}: has a line break or another control character: leave it out")
    return given


def launch(module: str, flags: argparse.ArgumentParser, argv: Sequence[str] | None, doc: str) -> int:
    """The main function of a launcher: check the program's arguments here, before the job waits in a queue; then submit it.

    Args:
        module: The program, a module with `main(argv)`.
        flags: Its parser; it has --output-dir.
        argv: The launcher's words, the cluster's and the program's; None: this process's.
        doc: The launcher's description.
    """
    cluster = argparse.ArgumentParser(description=doc, epilog=flags.format_help())
    cluster.formatter_class = argparse.RawDescriptionHelpFormatter
    add_cluster_arguments(cluster)
    setup_logging()
    try:
        args, rest = cluster.parse_known_args(job_words(argv))
        if args.use_volta32:
            logger.info("--use-volta32 has no effect: choose machines by --partition or --exclude")
        own = flags.parse_intermixed_args(rest)
        if not own.output_dir:
            raise BadInput("--output-dir is needed: the job's logs and checkpoints go there")
        folder = Path(own.output_dir).absolute() / "slurm"
        job = submit(Program(module, rest), Job.asked_for(args), folder, args.nodes, args.ngpus, args.cpu)
    except BadInput as err:
        logger.error("%s", err)
        return EXIT_BAD_INPUT
    logger.info("submitted job %s; its log: %s", job, Path(own.output_dir) / "slurm" / f"{job}_0_log.err")
    return EXIT_OK


class Program:
    """One rank of a program `module.main(argv)`, as submitit runs it in every task of a job.

    The program resumes by itself. When it stops on a signal (exit code 75, all ranks after the same step) the job is queued
    again.
    """

    def __init__(self, module: str, argv: list[str]) -> None:
        self.module = module
        self.argv = argv

    def __call__(self) -> int:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        code = importlib.import_module(self.module).main(self.argv)
        if code == EXIT_RESUMABLE:
            self._requeue()
        if code != EXIT_OK:
            raise SystemExit(code)
        return code

    def _requeue(self) -> None:
        """Rank 0 puts the job back into the queue, which ends all its tasks; the others wait for that."""
        if os.environ["RANK"] == "0":
            job = os.environ["SLURM_JOB_ID"]
            logger.info("job %s is queued again", job)
            subprocess.run(["scontrol", "requeue", job], check=True)
        time.sleep(REQUEUE_WAIT_S)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit calls for a signal outside the training loop: start over."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(program: Program, job: Job, folder: Path, num_nodes: int, ranks_per_node: int, on_cpus: bool) -> str:
    """Submit a job; returns its id. Its logs and submitit's files go to `folder`. A rank has a GPU, if not `on_cpus`.

    Raises:
        BadInput: No SLURM here, or SLURM refuses the job.
    """
    executor = _executor(job, folder)
    executor.update_parameters(nodes=num_nodes, tasks_per_node=ranks_per_node)
    if not on_cpus:
        executor.update_parameters(slurm_gpus_per_node=ranks_per_node)
    with _refusals():
        return executor.submit(program).job_id


def submit_array(programs: list[Program], last: Program, job: Job, folder: Path, num_gpus: int = 0) -> list[str]:
    """Submit programs of one task each as an array, and one that starts when all have ended; returns the ids.

    The last one starts though some failed, and has to say so: it would wait for ever for their success. Each gets `num_gpus`
    GPUs.

    Raises:
        BadInput: No SLURM here, or SLURM refuses a job.
    """
    executor = _executor(job, folder)
    executor.update_parameters(nodes=1, tasks_per_node=1)
    if num_gpus:
        executor.update_parameters(slurm_gpus_per_node=num_gpus)
    with _refusals():
        with executor.batch():
            submitted = [executor.submit(program) for program in programs]
        array = submitted[0].job_id.split("_")[0]
        executor.update_parameters(slurm_additional_parameters={"dependency": f"afterany:{array}"})
        return [*(one.job_id for one in submitted), executor.submit(last).job_id]


def _executor(job: Job, folder: Path) -> AutoExecutor:
    with needed_for("a SLURM job"):
        from submitit import AutoExecutor
    if shutil.which("sbatch") is None:
        raise BadInput("sbatch was not found: start this on a machine of the cluster, or use the program without SLURM")
    executor = AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=10_000)
    optional = {"slurm_partition": job.partition, "slurm_exclude": job.exclude, "slurm_comment": job.comment}
    optional |= {"slurm_mem": job.mem}
    executor.update_parameters(
        name=job.job_name,
        cpus_per_task=job.cpus_per_task,
        timeout_min=job.timeout,
        slurm_signal_delay_s=job.signal_delay,
        **{k: v for k, v in optional.items() if v},
    )
    return executor


@contextmanager
def _refusals() -> Iterator[None]:
    """SLURM's refusal of a job as one line."""
    from submitit.core.utils import FailedJobError

    try:
        yield
    except (FailedJobError, subprocess.CalledProcessError) as err:
        reason = next((line for line in str(err).splitlines() if "error" in line), str(err).splitlines()[0])
        raise BadInput(f"SLURM refused the job: {reason.strip()}") from err
