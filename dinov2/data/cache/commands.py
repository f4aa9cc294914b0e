"""`dinov2 cache build|verify|stats`: fill, check and describe a cache folder."""

from __future__ import annotations

import logging
import math
import shutil
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from dinov2.data.cache.file import DamagedItem, open_item
from dinov2.data.cache.folder import VolumeCache
from dinov2.data.cache.store import count_times, load_volume
from dinov2.data.datalist import Datalist, Entry
from dinov2.data.pool import unordered
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_RESUMABLE, BadInput, BadVolume
from dinov2.logging import Say
from dinov2.logging.progress import Progress, track

logger = logging.getLogger(__name__)

NUM_SAMPLED = 8  # volumes whose compression the forecast rests on
GIB = 2**30


class Built(NamedTuple):
    """What became of one entry."""

    made: int  # cached volumes
    there: int  # were cached already
    bytes: int  # of both
    raw: int  # bytes of the entry at 16 bits
    problem: str | None  # why the entry cannot be used
    refusal: str | None  # why the cache is not written any more


def build(datalist: Datalist, folder: Path, max_gb: float | None, num_workers: int, say: Say) -> int:
    """Cache every volume of a list, every time point of those with a time axis; what is there already is left.

    Returns:
        The exit code: 0, 2 where the folder could not take all or no entry can be used, 75 where it was interrupted.

    Raises:
        BadInput: The folder cannot be used, or its disk is too small by the forecast.
    """
    cache = VolumeCache(folder, max_gb)
    abandoned = cache.remove_abandoned()
    if abandoned:
        say(f"removed {abandoned} files that a killed process left half-written")
    entries = datalist.entries
    done: list[Built] = []
    try:
        for built in _build_in_order(cache, entries, num_workers, say):
            done.append(built)
            if built.refusal:
                break
    except KeyboardInterrupt:
        say(f"stopped after {len(done)} of {len(entries)} entries; the same command continues")
        return EXIT_RESUMABLE
    for built in done:
        if built.problem:
            say(f"cannot be used: {built.problem}")
    total = Counter(made=sum(b.made for b in done), there=sum(b.there for b in done), bad=sum(bool(b.problem) for b in done))
    size = sum(b.bytes for b in done) / GIB
    say(
        f"{folder}: {total['made']} volumes cached, {total['there']} were there, {size:.3g} GiB together; "
        f"{total['bad']} entries cannot be used"
    )
    refusal = next((b.refusal for b in done if b.refusal), None)
    if refusal:
        say(f"{folder}: stopped because the folder {refusal}; what is in it stays usable")
        return EXIT_BAD_INPUT
    return EXIT_OK if total["bad"] < len(entries) else EXIT_BAD_INPUT


def _build_in_order(cache: VolumeCache, entries: list[Entry], num_workers: int, say: Say) -> Iterator[Built]:
    """A few entries from all over the list, the forecast that they allow, then the rest, with progress."""
    step = max(1, len(entries) // NUM_SAMPLED)
    sampled = range(0, len(entries), step)[:NUM_SAMPLED]
    rest = [e for i, e in enumerate(entries) if i not in sampled]
    with closing(_build_all(cache, [entries[i] for i in sampled] + rest, num_workers)) as results:  # ends the processes
        first = list(islice(results, len(sampled)))
        yield from first
        say(forecast(entries, first, cache.folder, cache.max_bytes))
        size, bad = sum(b.bytes for b in first), sum(bool(b.problem) for b in first)
        with Progress(len(entries), "volumes", done=len(first)) as progress:
            for built in results:
                size, bad = size + built.bytes, bad + bool(built.problem)
                progress.update(note=f"{size / GIB:.3g} GiB, {bad} bad")
                yield built


def forecast(entries: list[Entry], first: list[Built], folder: Path, max_bytes: int | None) -> str:
    """One line on the size to expect.

    Raises:
        BadInput: More than the disk has free.
    """
    whole = sum(_raw_bytes(e) for e in entries)
    measured = [b for b in first if b.made + b.there and not b.problem]
    share = sum(b.bytes for b in measured) / max(1, sum(b.raw for b in measured)) if measured else 1.0
    expected, free = whole * share, shutil.disk_usage(folder).free
    limit = math.inf if max_bytes is None else max_bytes
    if not any(b.there for b in first) and min(expected, limit) > free:
        raise BadInput(
            f"cache folder {folder}: about {expected / GIB:.3g} GiB are needed and {free / GIB:.3g} GiB are free: choose "
            "another --cache-dir, or --max-gb to cache a part"
        )
    return (
        f"{len(entries)} entries, {whole / GIB:.3g} GiB at 16 bits; about {expected / GIB:.3g} GiB cropped and compressed, "
        f"judged from {len(measured)}; {free / GIB:.3g} GiB are free"
    )


def verify(datalist: Datalist, folder: Path, remove: bool, say: Say) -> int:
    """Read every cached volume against its checksum, and look for every volume of a list.

    Returns:
        0 where the cache is complete and whole, else 2.
    """
    cache = VolumeCache(folder)
    bad, unlisted = 0, 0
    belonging: set[str] = set()
    missing = [e.image for e in track(datalist.entries, "entries") if not _keys(cache, e, belonging)]
    for path in track(sorted(cache.items()), "cached volumes"):
        try:
            open_item(path)
            unlisted += path.stem not in belonging
            continue
        except DamagedItem as err:
            say(f"{path}: {err}{', removed' if remove else ''}")
        except OSError as err:
            say(f"{path}: cannot be read ({err.strerror})")
        bad += 1
        if remove:
            path.unlink()
    for image in missing:
        say(f"not cached, or its source changed or cannot be read: {image}")
    say(
        f"{folder}: {len(belonging)} volumes of the list, {len(missing)} entries not (wholly) there, {unlisted} volumes of "
        f"other lists or of changed sources, {bad} damaged"
    )
    return EXIT_BAD_INPUT if bad or missing else EXIT_OK


def stats(datalist: Datalist, folder: Path, say: Say) -> int:
    """Count and sizes of what is cached, of the list and besides."""
    cache = VolumeCache(folder)
    belonging: set[str] = set()
    complete = sum(_keys(cache, e, belonging) for e in datalist.entries)
    sizes = {p.stem: p.stat().st_size for p in cache.items()}
    of_list = [cache.path(key) for key in belonging]
    headers = [open_item(p, check=False).header for p in of_list]
    as_float = sum(4 * math.prod(h["shape"]) for h in headers)
    size = sum(sizes.get(key, 0) for key in belonging)
    raw = sum(h["slabs"] is None for h in headers)
    say(f"{folder}: {len(sizes)} volumes, {sum(sizes.values()) / GIB:.3g} GiB")
    share = f", {size / as_float:.0%} of float32" if as_float else ""
    say(f"  of {datalist.path}: {complete} of {len(datalist)} entries, {len(of_list)} volumes, {size / GIB:.3g} GiB{share}")
    say(f"  {len(of_list) - raw} compressed, {raw} stored as they are; {len(sizes) - len(of_list)} not of this list")
    return EXIT_OK


def _keys(cache: VolumeCache, entry: Entry, keys: set[str]) -> bool:
    """Adds an entry's keys that are cached; whether all its time points are."""
    try:
        num_times = count_times(entry, cache)
    except BadVolume:
        return False
    found = {k for k in (cache.key(entry, t) for t in range(num_times)) if k and cache.path(k).exists()}
    keys |= found
    return len(found) == num_times


def _raw_bytes(entry: Entry) -> int:
    shape = entry.shape if entry.axes != "xyzc" else entry.shape[:3]
    return 2 * math.prod(shape)


def _build_entry(cache: VolumeCache, entry: Entry) -> Built:
    made = there = size = 0
    raw = _raw_bytes(entry)
    try:
        for t in range(count_times(entry, cache)):
            path = cache.path(cache.key(entry, t) or "")
            if path.exists():
                there += 1
                size += path.stat().st_size
                continue
            load_volume(entry, t, cache)
            if cache.why_not_written:
                return Built(made, there, size, raw, None, cache.why_not_written)
            if path.exists():
                made += 1
                size += path.stat().st_size
    except BadVolume as err:
        return Built(made, there, size, raw, str(err), None)
    return Built(made, there, size, raw, None, None)


@lru_cache(maxsize=1)
def _open_cache(folder: Path, max_gb: float | None) -> VolumeCache:
    """The worker process's own."""
    return VolumeCache(folder, max_gb)


def _build_in_worker(folder: Path, max_gb: float | None, entry: Entry) -> Built:
    return _build_entry(_open_cache(folder, max_gb), entry)


def _died(entry: Entry, how: str) -> Built:
    why = f"{entry.image}: the process that read it {how}: if memory ran out, use fewer --workers; the same command tries again"
    return Built(0, 0, 0, _raw_bytes(entry), why, None)


def _build_all(cache: VolumeCache, entries: list[Entry], num_workers: int) -> Generator[Built, None, None]:
    """Entries in any order; several processes begin with the first ones."""
    if num_workers == 0:
        yield from (_build_entry(cache, e) for e in entries)
        return
    work = partial(_build_in_worker, cache.folder, None if cache.max_bytes is None else cache.max_bytes / GIB)
    yield from unordered(work, entries, num_workers, _died)
