"""Checkpoint folders: which are kept, what a half-written one does, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from dinov2.checkpointer.checkpointer import Checkpointer, save_atomically
from dinov2.errors import BadInput


def state(value: float, size: int = 4) -> dict:
    return {"model": {"w": torch.full((3, size), value)}, "counters": {"iteration": torch.tensor(value)}}


def test_the_newest_and_the_milestones_are_kept(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "c", keep=2, is_milestone=lambda i: (i + 1) % 4 == 0)
    for i in range(10):
        checkpointer.save(state(float(i)), i)
    assert checkpointer.iterations() == [3, 7, 8, 9]
    loaded = state(-1.0)
    checkpointer.load(loaded, 7)
    assert float(loaded["counters"]["iteration"]) == 7 and bool((loaded["model"]["w"] == 7).all())


def test_a_half_written_checkpoint_is_never_picked_up(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=3)
    checkpointer.save(state(1.0), 1)
    (tmp_path / ".incomplete-0000002").mkdir()
    (tmp_path / "0000003").mkdir()  # a folder without torch's index
    assert checkpointer.iterations() == [1]
    checkpointer.save(state(4.0), 4)
    assert not list(tmp_path.glob(".incomplete*")) and checkpointer.iterations() == [1, 4]


def test_only_a_failed_write_is_reported_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> None:
        def save(*_args: object, **_kwargs: object) -> None:
            raise CheckpointException("a rank failed", {0: (error, None)})

        monkeypatch.setattr("dinov2.checkpointer.checkpointer.dcp.save", save)
        Checkpointer(tmp_path, keep=1).save(state(1.0), 1)

    with pytest.raises(BadInput, match="No space left on device"):
        fail(OSError(28, "No space left on device"))
    with pytest.raises(CheckpointException):  # a bug of ours keeps its trace
        fail(KeyError("moments"))
    with pytest.raises(BadInput, match="teacher.pth: cannot be written"):
        (tmp_path / "file").write_text("not a folder")
        save_atomically({}, tmp_path / "file" / "teacher.pth")


def test_another_shape_or_a_damaged_index_is_refused_by_name(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=3)
    checkpointer.save(state(1.0), 1)
    with pytest.raises(BadInput, match=r"another architecture, 1 tensors differ \(model.w: saved \(3, 4\), now \(3, 5\)\)"):
        checkpointer.load(state(0.0, size=5), 1)
    (tmp_path / "0000001" / ".metadata").write_text("not an index")
    with pytest.raises(BadInput, match="0000001: damaged checkpoint"):
        checkpointer.load(state(0.0), 1)


def test_a_checkpoint_with_an_entry_that_is_no_tensor_is_refused_by_name(tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.zeros(3, 4), "note": "a word"}}, checkpoint_id=tmp_path / "0000001")
    with pytest.raises(BadInput, match="0000001: its entry model.note is no tensor: use a checkpoint that train3d.py wrote"):
        Checkpointer(tmp_path, keep=3).load(state(0.0), 1)
