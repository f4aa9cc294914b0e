"""Checkpoint folders: which are kept, what a half-written one does, what is refused."""

from __future__ import annotations

import gc
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from dinov2 import load_encoder
from dinov2.checkpointer.checkpointer import Checkpointer, _checksums
from dinov2.checkpointer.export import describe
from dinov2.checkpointer.saving import save_atomically
from dinov2.checkpointer.teacher import open_teacher
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


def test_saves_leave_no_garbage(tmp_path: Path) -> None:
    """Each left some hundred objects in cycles, with a larger state thousands: memory grew until the next collection."""
    checkpointer = Checkpointer(tmp_path, keep=1)
    left = []
    gc.disable()
    try:
        for i in range(4):  # in the first ones what earlier tests held may go
            gc.collect()
            for iteration in range(5 * i, 5 * i + 5):
                checkpointer.save(state(1.0), iteration)
            left.append(gc.collect())
    finally:
        gc.enable()
    assert min(left) < 100


def test_only_a_failed_write_is_reported_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> None:
        def save(*_args: object, **_kwargs: object) -> None:
            raise CheckpointException("a rank failed", {0: (error, None)})

        monkeypatch.setattr("dinov2.checkpointer.checkpointer.dcp.save", save)
        Checkpointer(tmp_path, keep=1).save(state(1.0), 1)

    with pytest.raises(BadInput, match="No space left on device"):
        fail(OSError(28, "No space left on device"))
    with pytest.raises(BadInput, match="not all of it was taken, as by a full disk"):  # torch's words on a full file system
        fail(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"))
    with pytest.raises(MemoryError, match=".incomplete-0000001"):
        fail(RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"))
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
    write_checksums(tmp_path / "0000001")
    with pytest.raises(BadInput, match="0000001: its entry model.note is no tensor: use a checkpoint that train3d.py wrote"):
        Checkpointer(tmp_path, keep=3).load(state(0.0), 1)


def write_checksums(folder: Path) -> None:
    """As whoever made the folder can."""
    (folder / "checksums.json").write_text(json.dumps(_checksums(folder)))


def call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a function by name; the fourth protocol follows dots in names."""
    words = [pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode() for word in (module, name, argument)]
    begin = pickle.PROTO + bytes([4]) + words[0] + words[1] + pickle.STACK_GLOBAL
    return begin + words[2] + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP


@pytest.mark.parametrize(
    "module, name",
    [("os", "mkdir"), ("torch.distributed.checkpoint.filesystem", "os.mkdir"), ("torch.serialization", "os.mkdir")],
)
def test_nothing_that_a_checkpoints_index_names_is_run(tmp_path: Path, module: str, name: str) -> None:
    folder = tmp_path / "0000001"
    Checkpointer(tmp_path, keep=3).save({"model": {"teacher": {"w": torch.zeros(2)}}}, 1)
    (folder / ".metadata").write_bytes(call(module, name, str(tmp_path / "ran")))
    write_checksums(folder)
    doors = [
        lambda: Checkpointer(tmp_path, keep=3).load({"model": {"teacher": {"w": torch.zeros(2)}}}, 1),
        lambda: open_teacher(folder),
        lambda: describe(folder),
        lambda: load_encoder(folder, "cpu"),
    ]
    for door in doors:
        with pytest.raises(BadInput, match="damaged checkpoint .its index names .*mkdir, which no checkpoint needs"):
            door()
    assert not (tmp_path / "ran").exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert (tmp_path / "ran").exists(), "it would have run"


def test_an_index_that_another_python_wrote_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"model": {"teacher": {"w": torch.arange(2.0)}}}
    Checkpointer(tmp_path, keep=3).save(state, 1)
    written = tmp_path / "0000001" / ".metadata"
    index = pickle.loads(written.read_bytes())
    # Debian 12's 3.11.2: a member of an enumeration is an attribute of its class; 3.13: paths are of another module
    other = type("PosixPath", (), {"__module__": "pathlib._local", "__reduce__": lambda self: (type(self), ("/", "x"))})
    index.storage_meta.checkpoint_id = other()
    with monkeypatch.context() as m:
        m.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)))
        m.setitem(sys.modules, "pathlib._local", SimpleNamespace(PosixPath=other))
        written.write_bytes(pickle.dumps(index))
    assert b"getattr" in written.read_bytes() and b"pathlib._local" in written.read_bytes()
    write_checksums(written.parent)
    read = {"model": {"teacher": {"w": torch.zeros(2)}}}
    Checkpointer(tmp_path, keep=3).load(read, 1)
    assert torch.equal(read["model"]["teacher"]["w"], state["model"]["teacher"]["w"])


@pytest.mark.parametrize(
    "thing, name", [(Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__"), (torch.float32, "to_real")]
)
def test_an_index_reaches_no_attribute_but_a_member_of_an_enumeration(tmp_path: Path, thing: object, name: str) -> None:
    Checkpointer(tmp_path, keep=3).save({"model": {"teacher": {"w": torch.zeros(2)}}}, 1)
    reached = type("Reached", (), {"__reduce__": lambda self: (getattr, (thing, name))})
    (tmp_path / "0000001" / ".metadata").write_bytes(pickle.dumps(reached()))
    write_checksums(tmp_path / "0000001")
    with pytest.raises(BadInput, match="damaged checkpoint .its index names an attribute of .*, which no checkpoint needs"):
        open_teacher(tmp_path / "0000001")


def test_an_index_that_claims_more_than_its_files_hold_builds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "0000001"
    Checkpointer(tmp_path, keep=3).save({"model": {"teacher": {"w": torch.zeros(2)}}}, 1)
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.state_dict_metadata["model.teacher.w"].size = torch.Size([10**12])
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    write_checksums(folder)
    with pytest.raises(BadInput, match="its index names tensors of 4000000000000 bytes, its files have"):
        open_teacher(folder)


@pytest.mark.parametrize("content", [None, "{}", "[]", "text", '{"a": 1}'])
def test_a_checkpoint_without_its_checksums_is_refused(tmp_path: Path, content: str | None) -> None:
    tensors = {"model": {"teacher": {"w": torch.zeros(2)}}}
    Checkpointer(tmp_path, keep=3).save(tensors, 1)
    listed = tmp_path / "0000001" / "checksums.json"
    listed.unlink() if content is None else listed.write_text(content)
    for door in (lambda: Checkpointer(tmp_path, keep=3).load(tensors, 1), lambda: open_teacher(tmp_path / "0000001")):
        with pytest.raises(BadInput, match="0000001: damaged checkpoint .checksums.json"):
            door()
