"""Folders to units of work: a file, or the DICOM files of a folder; with a stamp that changes when any of it does.

Nothing is opened here but what has no known ending (132 bytes, for DICOM's mark), headers that may name another file (NRRD,
MetaImage), and the small files that describe a data set.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinov2.data.volumes.bounded import NotAFile, check_regular
from dinov2.data.volumes.dicom import is_dicom
from dinov2.data.volumes.formats import DICOM, READING, format_by_name, is_volume_file, source_files, stem
from dinov2.errors import BadInput
from dinov2.files import MOST_FACTS_BYTES, is_utf8, read_json, user_path

SIDECAR = ".json"
_MARKERS = ("dataset_description.json", "dataset.json", "participants.tsv", "participants.csv")  # BIDS, Decathlon
_NOT_IMAGES = (
    ".bval", ".bvec", ".csv", ".docx", ".gz", ".html", ".jpeg", ".jpg", ".json", ".log", ".md", ".mat", ".pdf", ".png", ".py",
    ".raw", ".sha256", ".tar", ".toml", ".tsv", ".txt", ".xlsx", ".xml", ".yaml", ".yml", ".zip", ".zraw",
)  # fmt: skip

_SERIES = ("series", 1, 0)  # in the stamp of DICOM files: once their rows had no `series` or `place`: examined anew

Identity = tuple[int, int]  # device and inode: the same folder by whatever name


@dataclass(frozen=True)
class DatasetInfo:
    """What the nearest folder with a description says.

    Attributes:
        name: Of the data set.
        channels: Names of a fourth axis that is channels (Decathlon's `dataset.json`), else empty.
        modality: As written there; empty where it is not.
        unread: Name of a description that is there and cannot be read, which might have said more.
        is_folder: Nothing describes it, its name is that of the folder that was given.
    """

    name: str
    channels: tuple[str, ...] = ()
    modality: str = ""
    unread: str = ""
    is_folder: bool = False


@dataclass(frozen=True)
class Unit:
    """What is examined in one go.

    Attributes:
        path: The file; the folder of DICOM files.
        root: The folder that was asked for.
        stamp: Changes with the file, what lies beside it and belongs to it, its data set's description, and how it is read.
        dataset: The data set it is in.
        slices: Names of the DICOM files of a folder; empty for a file.
        sidecar: A JSON file with further facts.
        problem: Why there is nothing to examine: (reason, detail).
    """

    path: str
    root: str
    stamp: str
    dataset: DatasetInfo = field(default_factory=lambda: DatasetInfo(""))
    slices: tuple[str, ...] = ()
    sidecar: str | None = None
    problem: tuple[str, str] | None = None


def walk(folders: list[Path]) -> Iterator[Unit]:
    """All units below some folders, a folder reached twice (by a link, or given twice) once.

    Raises:
        BadInput: One is not there.
    """
    seen: set[Identity] = set()
    for folder in (Path(user_path(given)) for given in folders):
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder: give folders of volumes")
        root = os.path.abspath(folder)
        todo: list[tuple[str, DatasetInfo, tuple[Identity, ...]]] = [(root, DatasetInfo(Path(root).name, is_folder=True), ())]
        while todo:
            place, dataset, above = todo.pop()
            try:
                stat = os.stat(place)
                identity = (stat.st_dev, stat.st_ino)
                if identity in above:
                    yield _problem(place, root, "symlink_loop", "a link back to a folder above it")
                if identity in seen:
                    continue
                seen.add(identity)
                entries = sorted(os.scandir(place), key=lambda e: e.name)
            except OSError as err:
                yield _problem(place, root, _reason(err), err.strerror or type(err).__name__)
                continue
            for entry in entries:
                if not is_utf8(entry.name) and not entry.name.startswith("."):
                    yield _problem(entry.path, root, "name", "a name that is not in UTF-8: rename it")
            entries = [e for e in entries if is_utf8(e.name)]
            own, unread = _dataset(place, {e.name for e in entries})
            for path, why in unread:
                yield _problem(path, root, "sidecar", f"the data set's description cannot be used: {why}")
            dataset = own or dataset
            yield from _units(place, root, dataset, entries)
            below = [e.path for e in entries if _is_folder(e) and not e.name.startswith(".")]
            todo += [(path, dataset, (*above, identity)) for path in reversed(below)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, which `_units` reports
        return False


def _problem(path: str, root: str, reason: str, detail: str) -> Unit:
    return Unit(path, root, reason, problem=(reason, detail))


def _reason(err: OSError) -> str:
    reasons = {PermissionError: "permission", FileNotFoundError: "missing", NotAFile: "not_a_file"}
    return reasons.get(type(err), "unreadable")


def _units(folder: str, root: str, dataset: DatasetInfo, entries: list[os.DirEntry[str]]) -> Iterator[Unit]:
    """The files of one folder."""
    names, slices = {e.name for e in entries}, []
    for entry in entries:
        try:
            stat = entry.stat()
            is_volume = is_volume_file(entry.name, names)
            if entry.is_dir() or not (is_volume or _may_be_a_slice(entry.name)):
                continue
            check_regular(entry.path)
            if is_volume:
                yield _file_unit(entry, stat, root, dataset, folder, names)
            elif is_dicom(entry.path):
                slices.append((entry.name, stat.st_size, stat.st_mtime_ns))
        except OSError as err:
            if entry.is_symlink() or isinstance(err, PermissionError | NotAFile):
                yield _problem(entry.path, root, _reason(err), err.strerror or type(err).__name__)
    if slices:
        yield Unit(folder, root, _stamp([*slices, _SERIES], dataset), dataset, tuple(name for name, *_ in slices))


def _may_be_a_slice(name: str) -> bool:
    """Neither hidden, nor of another format, nor known not to be an image."""
    return format_by_name(name) in (None, DICOM) and not name.startswith(".") and not name.lower().endswith(_NOT_IMAGES)


def _file_unit(
    entry: os.DirEntry[str], stat: os.stat_result, root: str, dataset: DatasetInfo, folder: str, names: set[str]
) -> Unit:
    parts = [(entry.name, stat.st_size, stat.st_mtime_ns)]
    sidecar = stem(entry.name) + SIDECAR
    others = [Path(folder, sidecar)] if sidecar in names and sidecar not in _MARKERS else []
    for other in (*others, *source_files(Path(entry.path))[1:]):
        try:
            found = other.stat()
        except OSError:  # a link to nothing, or gone by now: reading it says so
            parts.append((other.name, -1, 0))
            continue
        parts.append((other.name, found.st_size, found.st_mtime_ns))
    return Unit(entry.path, root, _stamp(parts, dataset), dataset, (), str(others[0]) if others else None)


def _stamp(parts: list[tuple[str, int, int]], dataset: DatasetInfo) -> str:
    said = [dataset.name, *dataset.channels, dataset.modality, *([dataset.unread] if dataset.unread else [])]
    text = json.dumps([READING, parts, said])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _dataset(folder: str, names: set[str]) -> tuple[DatasetInfo | None, list[tuple[str, str]]]:
    """What a folder's own description says of the data set in it, None without one; what of it cannot be read, and why."""
    if not names.intersection(_MARKERS):
        return None, []
    facts: dict[str, Any] = {}
    unread: list[tuple[str, str]] = []
    for marker in (m for m in _MARKERS if m in names and m.endswith(SIDECAR)):
        path = os.path.join(folder, marker)
        try:
            found = read_json(path, most_bytes=MOST_FACTS_BYTES)
        except BadInput as err:
            unread.append((path, str(err).removeprefix(path).removeprefix(": ").strip()))
            continue
        if isinstance(found, dict):
            facts = {**found, **facts}
        else:
            unread.append((path, f"holds a {type(found).__name__}, expected an object"))
    names_of = facts.get("modality", facts.get("channel_names"))
    channels = tuple(str(v) for v in names_of.values()) if isinstance(names_of, dict) else ()
    name = facts.get("Name") or facts.get("name") or Path(folder).name
    modality = channels[0] if len(channels) == 1 else ""
    described = os.path.basename(unread[0][0]) if unread else ""
    return DatasetInfo(str(name), channels if len(channels) > 1 else (), modality, described), unread
