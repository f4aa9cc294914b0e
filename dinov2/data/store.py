"""Preprocessed volumes by entry: loaded on demand, kept in memory up to a limit, bad ones remembered."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from dinov2.data.datalist import Entry
from dinov2.data.preprocess import Volume, preprocess
from dinov2.data.volumes import open_volume
from dinov2.errors import BadVolume


class VolumeStore:
    """Least-recently-used store of preprocessed volumes, one per loader process.

    Args:
        entries: The datalist's entries.
        max_bytes: Voxel bytes kept; 0 keeps nothing.
    """

    def __init__(self, entries: list[Entry], max_bytes: int) -> None:
        self.entries = entries
        self.max_bytes = max_bytes
        self._kept: OrderedDict[tuple[int, int], Volume] = OrderedDict()
        self._num_times: dict[int, int] = {}
        self._bad: dict[tuple[int, int | None], str] = {}  # (entry, time point), None: the whole file
        self._bytes = 0

    def get(self, index: int, rng: np.random.Generator) -> Volume:
        """The volume of an entry; of one with a time axis, a time point drawn from `rng`.

        Raises:
            BadVolume: It cannot be used; remembered, so that the file is read once.
        """
        times = self._count_times(index)
        key = (index, int(rng.integers(times)) if times > 1 else 0)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key in self._bad:
            raise BadVolume(self._bad[key])
        try:
            raw = open_volume(self.entries[index])
            volume = preprocess(raw.read(key[1]), raw.spacing_mm, raw.path)
        except BadVolume as err:
            self._bad[key] = str(err)
            raise
        self._keep(key, volume)
        return volume

    def _count_times(self, index: int) -> int:
        """Time points of an entry, from its file's header, read once."""
        if (index, None) in self._bad:
            raise BadVolume(self._bad[index, None])
        if index not in self._num_times:
            try:
                self._num_times[index] = open_volume(self.entries[index]).num_times
            except BadVolume as err:
                self._bad[index, None] = str(err)
                raise
        return self._num_times[index]

    def _keep(self, key: tuple[int, int], volume: Volume) -> None:
        if volume.data.nbytes > self.max_bytes:
            return
        self._kept[key] = volume
        self._bytes += volume.data.nbytes
        while self._bytes > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.data.nbytes
