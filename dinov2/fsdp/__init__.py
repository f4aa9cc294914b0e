"""Training checkpoints as torch.distributed.checkpoint folders: atomic, pruned, checked before they are loaded."""

from __future__ import annotations

import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dinov2.errors import BadInput

logger = logging.getLogger(__name__)

# what reading a truncated or foreign checkpoint raises
_DAMAGED = (OSError, EOFError, CheckpointException, UnpicklingError, AttributeError, ImportError, RuntimeError)
StateDict = dict[str, Any]  # nested, tensors only: nothing has to be unpickled but torch's own index


class Checkpointer:
    """Numbered checkpoint folders `<iteration>` (zero-based, seven digits) below one folder.

    Args:
        folder: Usually `<output>/checkpoints`.
        keep: Newest checkpoints kept.
        is_milestone: Iterations whose checkpoints are kept besides.
    """

    def __init__(self, folder: Path, keep: int, is_milestone: Callable[[int], bool] = lambda _: False) -> None:
        self.folder = folder
        self.keep = keep
        self.is_milestone = is_milestone

    def iterations(self) -> list[int]:
        """Iterations of the complete checkpoints, ascending."""
        names = (p.name for p in self.folder.glob("[0-9]*") if (p / ".metadata").is_file())
        return sorted(int(n) for n in names if n.isdigit())

    def path(self, iteration: int) -> Path:
        return self.folder / f"{iteration:07d}"

    def save(self, state: StateDict, iteration: int) -> Path:
        """Write a checkpoint aside, rename it into place, then drop the ones that are no longer kept."""
        temporary = self.folder / f".incomplete-{iteration:07d}"
        self.remove_incomplete()
        with writing(temporary), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is (disabled|unavailable|not).*")
            dcp.save(state, checkpoint_id=temporary)
        target = self.path(iteration)
        if target.exists():  # written by a run that was killed before its metrics; the same content
            shutil.rmtree(target)
        os.replace(temporary, target)
        self._prune()
        return target

    def remove_incomplete(self) -> None:
        """Delete what a killed run left half-written."""
        for leftover in self.folder.glob(".incomplete-*"):
            shutil.rmtree(leftover)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _prune(self) -> None:
        droppable = [i for i in self.iterations() if not self.is_milestone(i)]
        for iteration in droppable[: -self.keep]:
            shutil.rmtree(self.path(iteration))

    def load(self, state: StateDict, iteration: int) -> None:
        """Fill the tensors of `state` in place.

        Raises:
            BadInput: The checkpoint is damaged, or belongs to another architecture; the first differences are named.
        """
        path = self.path(iteration)
        reader = dcp.FileSystemReader(path)
        try:
            saved = {k: tuple(m.size) for k, m in reader.read_metadata().state_dict_metadata.items()}
            self._require_same(saved, dict(_flat_shapes(state)), path)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch.distributed is (disabled|unavailable|not).*")
                dcp.load(state, storage_reader=reader)
        except _DAMAGED as err:
            raise BadInput(
                f"{path}: damaged checkpoint ({str(err).splitlines()[0][:120]}): "
                "delete this folder to resume from the one before"
            ) from err

    @staticmethod
    def _require_same(saved: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], path: Path) -> None:
        differing = sorted(k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k))
        if differing:
            examples = "; ".join(f"{k}: saved {saved.get(k, 'no')}, now {wanted.get(k, 'no')}" for k in differing[:3])
            raise BadInput(
                f"{path}: checkpoint of another architecture, {len(differing)} tensors differ ({examples}): "
                "use the configuration it was written with, or another --output-dir"
            )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full disk or a lost folder raises into one line; anything else is a bug and keeps its trace.

    Raises:
        BadInput: Something could not be written.
    """
    try:
        yield
    except OSError as err:
        raise _cannot_write(path, err) from err
    except CheckpointException as err:  # torch's wrapper: per rank, the error and its trace
        causes = [cause for cause, _trace in err.failures.values()]
        if not all(isinstance(cause, OSError) for cause in causes):
            raise
        raise _cannot_write(path, causes[0]) from err


def _cannot_write(path: Path, err: OSError) -> BadInput:
    return BadInput(
        f"{path}: cannot be written ({err.strerror or err}): make room or choose another --output-dir; "
        "the last complete checkpoint is intact"
    )


def _flat_shapes(state: StateDict, prefix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield prefix + key, tuple(value.shape)
        else:
            yield from _flat_shapes(value, f"{prefix}{key}.")


def save_atomically(obj: Any, path: Path) -> None:
    """`torch.save` to a temporary name, then rename."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        buffer = io.BytesIO()  # torch's own file writer hides a full disk behind a RuntimeError
        torch.save(obj, buffer)
        temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, path)
