"""A folder of preprocessed volumes, shared by any number of processes.

`cache.json` says what the folder holds; a folder of another preprocessing or version is refused. Each volume (each time point
of one with a time axis) is a file named by what it was made from, so that a changed source is never served from here. Files
are written aside and renamed; a damaged one is named and made anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dinov2.data.cache.file import DamagedItem, FileState, Item, encode, open_item
from dinov2.data.datalist import Entry
from dinov2.data.preprocess import PREPROCESSING, Volume
from dinov2.data.volumes.bounded import open_regular
from dinov2.data.volumes.formats import READING, source_files
from dinov2.errors import BadInput
from dinov2.files import TEMPORARY, read_json, replacing, to_json

logger = logging.getLogger(__name__)

VERSION = 1
MANIFEST = "cache.json"
SUFFIX = ".vol"
_SAMPLE_BYTES = 65536  # of the source's beginning and end; a gzip file's end holds the checksum of all of it
_RECOUNT_S = 5.0


class VolumeCache:
    """Preprocessed volumes on disk.

    Args:
        folder: Made where it does not exist.
        max_gb: The folder stops growing at this size (GiB). Nothing is thrown out: a run goes round all volumes, so that
            making room for the newest would lose each before it is used again.

    Raises:
        BadInput: The folder cannot be used, or holds volumes of another preprocessing or version.
    """

    def __init__(self, folder: str | Path, max_gb: float | None = None) -> None:
        self.folder = Path(folder)
        self.max_bytes = None if max_gb is None else int(max_gb * 2**30)
        self._why_not_written: str | None = None
        self._fingerprints: dict[str, dict[str, Any] | None] = {}
        self._checked: dict[str, FileState] = {}  # by key, as they were when this process verified their checksums
        self._check_manifest()
        self._bytes, self._counted_at = 0, -math.inf

    def _check_manifest(self) -> None:
        wanted = {"format": "dinov2-3d volume cache", "version": VERSION, "preprocessing": PREPROCESSING}
        path = self.folder / MANIFEST
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            others = [p.name for p in self.folder.iterdir() if not p.name.startswith((f".{MANIFEST}", TEMPORARY))]
            if not others:
                with replacing(path, private=True) as temporary:
                    temporary.write_text(to_json(wanted, indent=1) + "\n", encoding="utf-8")
            if not path.exists():
                raise BadInput(f"cache folder {self.folder} holds other files and no {MANIFEST}: choose an empty one")
        except OSError as err:
            raise BadInput(f"cache folder {self.folder}: {err.strerror}: choose another --cache-dir") from err
        found = read_json(path, f"cache folder {self.folder}: {MANIFEST}", remedy="delete the folder")
        if found != wanted:
            raise BadInput(f"cache folder {self.folder}: {_difference(found, wanted)}: choose another --cache-dir or delete it")

    def items(self) -> Iterator[Path]:
        """The files of the cached volumes."""
        return self.folder.glob(f"??/*{SUFFIX}")

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / (key + SUFFIX)

    def key(self, entry: Entry, time_point: int) -> str | None:
        """What names the cached volume: everything it is made from. None where the source file cannot be read."""
        source = self._source(entry)
        if source is None:
            return None
        return key_of([source, time_point])

    def _source(self, entry: Entry) -> dict[str, Any] | None:
        """File name, size, time and a sample of the content, once per process; and what the list says of it.

        The folder's path is left out, so that a copied data set (with its file times) finds its cache.
        """
        file = self.fingerprint(entry.image)
        if file is None:
            return None
        source = {"file": file, "spacing": entry.spacing_mm, "axes": entry.axes, "channel": entry.channel}
        return source | ({"orientation": entry.orientation} if entry.orientation else {})

    def fingerprint(self, path: str) -> dict[str, Any] | None:
        """What tells a source file's content and how it is read, once per process; None where it cannot be read."""
        if path not in self._fingerprints:
            try:
                self._fingerprints[path] = _fingerprint(Path(path))
            except OSError:
                self._fingerprints[path] = None  # loading it will say what is wrong
        return self._fingerprints[path]

    def num_times(self, entry: Entry) -> int | None:
        """Time points of an entry, from its first cached one; None where that is not there."""
        item = self.open(self.key(entry, 0), entry.image)
        return None if item is None else item.header["source"]["num_times"]

    def load(self, entry: Entry, time_point: int) -> Volume | None:
        """A cached volume; None where it is not there, or is damaged (which is said)."""
        item = self.open(self.key(entry, time_point), entry.image)
        return None if item is None else item.volume()

    def open(self, key: str | None, name: str) -> Item | None:
        """A cached file whose checksum holds; None where it is not there, or is damaged (which is said, of `name`)."""
        if key is None:
            return None
        path = self.path(key)
        try:
            item = open_item(path, checked=self._checked.get(key))
            self._checked[key] = item.state
            return item
        except FileNotFoundError:
            return None
        except (DamagedItem, OSError) as err:
            what = "%s: the cached volume of %s %s; made anew from its source"
            logger.warning(what, path, name, err if isinstance(err, DamagedItem) else f"cannot be read ({err.strerror})")
            return None

    def store(self, entry: Entry, time_point: int, num_times: int, volume: Volume) -> int:
        """Keep a volume; returns its bytes, 0 where it was not written."""
        return self.write(
            self.key(entry, time_point), volume, {"image": entry.image, "time": time_point, "num_times": num_times}
        )

    def write(self, key: str | None, volume: Volume, source: dict[str, Any]) -> int:
        """Keep what was made from `source` (JSON types) under a key; returns its bytes, 0 where it was not written.

        Another process that writes the same one, a full disk, a folder that may only be read or is as large as allowed, are
        no errors: the last three are said once, and nothing more is written.
        """
        if key is None or self._why_not_written:
            return 0
        data = encode(volume, source)
        if self.max_bytes is not None and self._size() + len(data) > self.max_bytes:
            self._stop_writing(f"has reached its limit of {self.max_bytes / 2**30:.3g} GiB")
            return 0
        path = self.path(key)
        try:
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_name(f".{key}.tmp")
            with _exclusive(temporary) as file:
                if file is None:
                    return 0
                file.write(data)
                file.flush()
                os.replace(temporary, path)
        except OSError as err:
            self._stop_writing(f"cannot be written ({err.strerror})")
            return 0
        self._bytes += len(data)
        return len(data)

    def _size(self) -> int:
        """Bytes in the folder, counted again after some seconds, because other processes write too."""
        if time.monotonic() - self._counted_at > _RECOUNT_S:
            self._bytes, self._counted_at = sum(p.stat().st_size for p in self.items()), time.monotonic()
        return self._bytes

    def _stop_writing(self, reason: str) -> None:
        self._why_not_written = reason
        logger.warning("cache folder %s %s: volumes that are not in it are made from their sources", self.folder, reason)

    @property
    def why_not_written(self) -> str | None:
        """Why nothing more is written; None while it is."""
        return self._why_not_written

    def remove_abandoned(self) -> int:
        """Remove what a killed process left half-written; returns how many files."""
        count = 0
        for path in self.folder.glob("??/.*.tmp"):
            with _exclusive(path) as file:
                if file is not None:
                    path.unlink()
                    count += 1
        return count


def key_of(made_from: Any) -> str:
    """A key from all that something is made from (JSON types)."""
    return hashlib.blake2b(json.dumps(made_from, sort_keys=True).encode(), digest_size=20).hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    stats = []
    for part in source_files(path):
        with open_regular(part) as file:
            stat = os.fstat(file.fileno())
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, stat.st_size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
        stats.append([part.name, stat.st_size, stat.st_mtime_ns])
    return {"stat": stats, "sample": digest.hexdigest(), "reading": READING}


@contextmanager
def _exclusive(path: Path) -> Iterator[BinaryIO | None]:
    """A file opened for writing by this process alone, or None where another has it; unless renamed it is removed on error.

    The lock goes with the process, however it ends. What was opened may meanwhile have been renamed by its writer: then it is
    a finished file, and not touched.
    """
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino
        except BlockingIOError:
            mine = False
        if not mine:
            yield None
            return
        with ExitStack() as on_failure:
            on_failure.callback(path.unlink, missing_ok=True)
            file.truncate(0)
            yield file
            on_failure.pop_all()


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    """The first way in which a manifest is another one's."""
    if not isinstance(found, dict) or found.get("format") != wanted["format"]:
        return f"{MANIFEST} is not that of a volume cache"
    if found.get("version") != wanted["version"]:
        return f"has version {found.get('version')}, this program writes version {wanted['version']}"
    before, now = found.get("preprocessing"), wanted["preprocessing"]
    for name in sorted({*before, *now} if isinstance(before, dict) else now):
        old = before.get(name) if isinstance(before, dict) else None
        if old != now.get(name):
            return f"was made with preprocessing {name}={old!r}, this program uses {now.get(name)!r}"
    return "holds keys that this program does not know"
