"""Training checkpoints as torch.distributed.checkpoint folders: atomic, pruned, checked before they are loaded.

Every rank writes its share while training goes on; when the last is done, rank 0 adds checksums and renames the folder. A
checkpoint loads on any number of ranks and with any strategy.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dinov2.checkpointer.index import SafeReader, saved_tensors
from dinov2.checkpointer.saving import CHECKSUMS
from dinov2.distributed import barrier, gather_objects, get_global_rank, get_global_size, is_enabled, is_main_process
from dinov2.errors import BadInput, is_out_of_memory
from dinov2.files import cannot_write, read_json, write_json, writing

logger = logging.getLogger(__name__)

# what reading a truncated or foreign checkpoint raises
DAMAGED = (OSError, JSONDecodeError, EOFError, CheckpointException, UnpicklingError, AttributeError, ImportError, RuntimeError)
StateDict = dict[str, Any]  # nested, tensors only: nothing has to be unpickled but torch's own index


class Checkpointer:
    """Numbered checkpoint folders `<iteration>` (zero-based, seven digits) below one folder.

    Args:
        folder: Usually `<output>/checkpoints`.
        keep: Newest checkpoints kept.
        is_milestone: Iterations whose checkpoints are kept besides.

    All ranks of a job call `save`, `finish` and `load` together.
    """

    def __init__(self, folder: Path, keep: int, is_milestone: Callable[[int], bool] = lambda _: False) -> None:
        self.folder = folder
        self.keep = keep
        self.is_milestone = is_milestone
        self._writing: tuple[int, Future[Any]] | None = None
        # a group of its own, because the writers talk to each other while the training does
        self._group = dist.new_group(backend="gloo") if is_enabled() else None

    def iterations(self) -> list[int]:
        """Iterations of the complete checkpoints, ascending."""
        names = (p.name for p in self.folder.glob("[0-9]*") if (p / ".metadata").is_file())
        return sorted(int(n) for n in names if n.isdigit())

    def newest(self) -> int | None:
        """The newest complete checkpoint, as rank 0 sees it."""
        found: list[int | None] = [max(self.iterations(), default=None) if is_main_process() else None]
        if is_enabled():
            dist.broadcast_object_list(found, src=0, group=self._group)
        return found[0]

    def path(self, iteration: int) -> Path:
        return self.folder / f"{iteration:07d}"

    def save(self, state: StateDict, iteration: int) -> None:
        """Copy the state aside and start writing it; what was being written before is finished first."""
        self.finish()
        if is_main_process():
            self.remove_incomplete()
        barrier()
        temporary = self.folder / f".incomplete-{iteration:07d}"
        with _writing_shares(temporary), _quiet():
            if is_enabled():
                saving = dcp.async_save(state, checkpoint_id=temporary, process_group=self._group)
                written = saving if isinstance(saving, Future) else saving.upload_completion
                self._writing = iteration, written
            else:
                dcp.save(state, checkpoint_id=temporary)
                self._complete(iteration)
                _drop_cycles()

    def finish(self, wait: bool = True) -> None:
        """Complete what is being written: rename it into place and drop the ones that are no longer kept.

        Args:
            wait: False only looks whether the writing is done, for a call at every step.
        """
        if self._writing is not None and (wait or self._writing[1].done()):
            iteration, future = self._writing
            self._writing = None
            with _writing_shares(self.folder / f".incomplete-{iteration:07d}"), _quiet():
                future.result()
            _drop_cycles()
            if is_main_process():  # its part ends after all others': it writes the index
                self._complete(iteration)
        if wait:
            barrier()  # always: whether a rank had seen the end before must not change which collectives it takes part in

    def _complete(self, iteration: int) -> None:
        temporary, target = self.folder / f".incomplete-{iteration:07d}", self.path(iteration)
        with writing(temporary):
            write_json(temporary / CHECKSUMS, _checksums(temporary))
        if target.exists():  # written by a run that was killed before its metrics; the same content
            shutil.rmtree(target)
        os.replace(temporary, target)
        self._prune()

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
        reader = SafeReader(path)
        try:
            _require_whole(path)
            saved = {k: tuple(m.size) for k, m in saved_tensors(reader, path).items()}
            self._require_same(saved, dict(_flat_shapes(state)), path)
            with _quiet():
                dcp.load(state, storage_reader=reader)
        except DAMAGED as err:
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


def _checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of every file of a checkpoint."""
    return {p.name: _crc32(p) for p in sorted(folder.iterdir()) if p.name != CHECKSUMS}


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while part := file.read(2**24):
            value = zlib.crc32(part, value)
    return value


def problems_of(folder: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """What of a checkpoint's files is not as it was written; each of `ranks` looks at its share."""
    try:
        listed = read_json(folder / CHECKSUMS)
    except BadInput:
        return [f"{CHECKSUMS} is missing or not readable"]
    needed = {".metadata", *(p.name for p in folder.glob("*.distcp"))}
    if not isinstance(listed, dict) or not needed <= listed.keys():
        return [f"{CHECKSUMS} does not list its files"]
    problems = []
    for name, checksum in sorted(listed.items())[rank::ranks]:
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif _crc32(path) != checksum:
            problems.append(f"{name} does not match its checksum")
    return problems


def _require_whole(folder: Path) -> None:
    """Raise `EOFError` naming the first file that is not what was written; all ranks call it."""
    found = problems_of(folder, get_global_rank(), get_global_size())
    problems = [p for of_rank in gather_objects(found) for p in of_rank]
    if problems:
        raise EOFError(problems[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remark that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is (disabled|unavailable|not).*")
        yield


@contextmanager
def _writing_shares(path: Path) -> Iterator[None]:
    """As `writing`, for what torch's writers of all ranks raise; anything but a failed write is a bug and keeps its trace.

    Raises:
        BadInput: Something could not be written.
        MemoryError: There was no memory for it.
    """
    try:
        with writing(path):
            yield
    except CheckpointException as err:  # torch's wrapper: per rank, the error and its trace
        causes = [cause for cause, _trace in err.failures.values()]
        if any(map(is_out_of_memory, causes)):
            raise MemoryError(f"writing {path}") from err
        failed = [found for cause in causes if (found := _failed_write(cause))]
        if not failed or len(failed) < len(causes):
            raise
        raise cannot_write(path, failed[0]) from err


def _drop_cycles() -> None:
    """Free what torch's writer leaves in reference cycles: thousands of objects a save, while a program collects rarely.

    The young ones alone: a full collection would go through torch's million objects.
    """
    gc.collect(0)


def _failed_write(cause: BaseException) -> OSError | None:
    """The error of a write; torch's own writer hides a full disk behind a RuntimeError about a file's length."""
    if isinstance(cause, RuntimeError) and ("unexpected pos" in str(cause) or "PytorchStreamWriter failed" in str(cause)):
        return OSError("not all of it was taken, as by a full disk")
    return cause if isinstance(cause, OSError) else None


def _flat_shapes(state: StateDict, prefix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield prefix + key, tuple(value.shape)
        else:
            yield from _flat_shapes(value, f"{prefix}{key}.")
