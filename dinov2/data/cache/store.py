"""Preprocessed volumes by entry: from memory, the cache folder or the source file, in this order; bad ones remembered."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from dinov2.data.cache.folder import VolumeCache
from dinov2.data.datalist import Entry
from dinov2.data.preprocess import Volume, preprocess
from dinov2.data.volumes.grids import GridMap
from dinov2.data.volumes.opening import open_volume
from dinov2.errors import BadInput, BadVolume
from dinov2.geometry import triple


def count_times(entry: Entry, cache: VolumeCache | None = None) -> int:
    """Time points of an entry, from the cache or the file's header.

    Raises:
        BadVolume: The file cannot be used.
    """
    cached = cache.num_times(entry) if cache else None
    return open_volume(entry).num_times if cached is None else cached


def load_volume(entry: Entry, time_point: int, cache: VolumeCache | None = None) -> Volume:
    """One time point of an entry, preprocessed: from the cache, or from its file and then kept in the cache.

    Raises:
        BadVolume: The file cannot be used.
    """
    volume = cache.load(entry, time_point) if cache else None
    if volume is None:
        raw = open_volume(entry)
        voxels = raw.read(time_point)
        padding = raw.padding(voxels)
        if entry.orientation is None:
            volume = preprocess(voxels, raw.spacing_mm, raw.path, padding)
        else:
            grid = GridMap(triple(voxels.shape), raw.affine, entry.orientation, None)
            voxels = grid.prepare(voxels, linear=True)
            padding = None if padding is None else grid.prepare(padding, linear=False)
            volume = preprocess(voxels, grid.spacing_mm, raw.path, padding, across=2)
        if cache:
            cache.store(entry, time_point, raw.num_times, volume)
    return volume


class VolumeStore:
    """Least-recently-used store of preprocessed volumes, one per loader process.

    Args:
        entries: The datalist's entries.
        max_bytes: Voxel bytes kept in memory; 0 keeps nothing.
        cache: Folder on disk, filled with what is made from source files.
    """

    def __init__(self, entries: list[Entry], max_bytes: int, cache: VolumeCache | None = None) -> None:
        self.entries = entries
        self.max_bytes = max_bytes
        self.cache = cache
        self._kept: OrderedDict[tuple[int, int], Volume] = OrderedDict()
        self._num_times: dict[int, int] = {}
        self._bad: dict[tuple[int, int | None], str] = {}  # (entry, time point), None: the whole file
        self._bytes = 0

    def get(self, index: int, rng: np.random.Generator) -> Volume:
        """The volume of an entry; of one with a time axis, a time point drawn from `rng`.

        Raises:
            BadVolume: It cannot be used; remembered, so that the file is read once.
            BadInput: There was no memory for it, which says nothing of the volume: with another one the run would be another.
        """
        times = self._count_times(index)
        key = (index, int(rng.integers(times)) if times > 1 else 0)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key in self._bad:
            raise BadVolume(self._bad[key])
        try:
            volume = load_volume(self.entries[index], key[1], self.cache)
        except BadVolume as err:
            self._bad[key] = _of_the_volume(err)
            raise
        self._keep(key, volume)
        return volume

    def _count_times(self, index: int) -> int:
        """Time points of an entry, looked up once."""
        if (index, None) in self._bad:
            raise BadVolume(self._bad[index, None])
        if index not in self._num_times:
            try:
                self._num_times[index] = count_times(self.entries[index], self.cache)
            except BadVolume as err:
                self._bad[index, None] = _of_the_volume(err)
                raise
        return self._num_times[index]

    def _keep(self, key: tuple[int, int], volume: Volume) -> None:
        if volume.voxels.nbytes > self.max_bytes:
            return
        self._kept[key] = volume
        self._bytes += volume.voxels.nbytes
        while self._bytes > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.voxels.nbytes


def _of_the_volume(err: BadVolume) -> str:
    """What is wrong with a volume.

    Raises:
        BadInput: Nothing: memory had run out.
    """
    if err.reason != "memory":
        return str(err)
    raise BadInput(
        f"{err}: use fewer train.num_workers or a smaller train.memory_store_mb; the same command continues. Where it is the "
        "volume itself that is too large, take it off the list (--allow-changed-data)"
    ) from err
