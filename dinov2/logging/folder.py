"""The folder of a run: one run at a time, and what an earlier one left."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dinov2.distributed import barrier
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.files import lock, user_path
from dinov2.logging.provenance import RUN_FILE
from dinov2.logging.warned import WARNINGS_FILE

logger = logging.getLogger(__name__)


# what 3DINO's and DINOv2's programs leave in the folder of a pretraining, and of an evaluation
THEIR_PRETRAINING = ("last_checkpoint.rank_*", "model_*.rank_*.pth", "training_metrics.json", "eval/*/teacher_checkpoint.pth")
THEIR_EVALUATION = (
    "last_checkpoint", "best_model.pth", "results.json", "results_eval_linear.json", "running_checkpoint_linear_eval.pth",
)  # fmt: skip


def refuse_another_programs_run(folder: Path, patterns: Sequence[str] = (*THEIR_PRETRAINING, *THEIR_EVALUATION)) -> None:
    """Leave a folder alone that a program without our `run.json` has written a run to.

    Raises:
        BadInput: There is one; what shows it, and how to go on from its weights.
    """
    if (folder / RUN_FILE).exists():
        return
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    if not found:
        return
    teachers = sorted(folder.glob("eval/*/teacher_checkpoint.pth"), key=lambda path: path.stat().st_mtime)
    teacher = teachers[-1] if teachers else "<its eval/.../teacher_checkpoint.pth>"
    raise BadInput(
        f"output folder {folder}: holds another program's run ({found[0].relative_to(folder)}, no {RUN_FILE}): choose another "
        f"--output-dir; to go on from that run's weights, pretrain with student.full_pretrained_weights={teacher}"
    )


@contextmanager
def locked_folder(path: str | Path) -> Iterator[Path]:
    """An output folder that only one run uses at a time; the lock goes with the process, however it ends.

    Raises:
        BadInput: It cannot be written, or another run has it.
    """
    if not str(path):
        raise BadInput("the output folder has no name: choose an --output-dir")
    folder = Path(user_path(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a")
    except OSError as err:
        raise BadInput(f"output folder {folder}: {err.strerror}: choose another --output-dir") from err
    with handle:
        if not lock(handle):
            raise BadInput(f"output folder {folder}: another run is using it: wait for it or choose another")
        yield folder


@contextmanager
def run_folder(path: str, runtime: Runtime) -> Iterator[Path]:
    """The output folder; rank 0 holds its lock, the others wait until it does.

    Raises:
        BadInput: As `locked_folder`, or it holds another program's run; nothing is written to it then.
    """
    if not path:
        raise BadInput("the output folder has no name: choose an --output-dir")
    refuse_another_programs_run(Path(path))  # on every rank: a run of ours has its run.json before any of these
    if runtime.rank == 0:
        with locked_folder(path) as folder:
            barrier()
            yield folder
    else:
        barrier()
        yield Path(path)


# what it writes; RUN_FILE last, so that what a kill leaves is still known for ours
PRETRAINING = (
    "checkpoints", "eval", "tensorboard", "training_metrics.json", "evaluation_metrics.json", WARNINGS_FILE, "config.yaml",
    RUN_FILE,
)  # fmt: skip


def set_aside(output_dir: Path, patterns: Sequence[str] = PRETRAINING) -> None:
    """Move what an earlier run left (files and folders of these names or patterns) into `previous_<n>`: nothing is lost."""
    found = [path for pattern in patterns for path in sorted(output_dir.glob(pattern))]
    if not found:
        return
    number = 1 + len(list(output_dir.glob("previous_*")))
    target = output_dir / f"previous_{number}"
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    logger.info("--no-resume: the earlier run was moved to %s", target)
