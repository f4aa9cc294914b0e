"""What weights say of the scans that they were trained on: spacings, modalities, organs; and what lies outside of these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinov2.errors import BadInput
from dinov2.files import is_number
from dinov2.geometry import Spacing, triple

DOMAIN = "domain"  # of a checkpoint's meta
PERCENTILES = (1, 50, 99)  # of spacings: a handful of odd scans in a large list widens no range
SLACK = 1.1  # times the ends of the range, which still counts as within
NEARLY_ALL = 0.9  # share of the scans whose modality or organ must be known before another one is called new
_SHOWN = 3  # names of modalities and organs in a line
Steps = tuple[float, float]  # mm: between voxels of a slice (the mean of its two axes), between slices


@dataclass(frozen=True)
class Domain:
    """Numbers and counts; no path and no name of a person.

    Attributes:
        num_scans: Of the list, start weights' included.
        in_slice_mm: `PERCENTILES` of the distance of voxels in a slice; None where no scan says it.
        across_mm: Of the distance of slices.
        modalities: Scans by modality, of those that say it.
        organs: The same.
    """

    num_scans: int
    in_slice_mm: Spacing | None
    across_mm: Spacing | None
    modalities: Mapping[str, int]
    organs: Mapping[str, int]

    @classmethod
    def of(cls, num_scans: int, steps: Sequence[Steps], modalities: Sequence[str], organs: Sequence[str]) -> Domain:
        """From what scans say, as far as they do."""
        in_slice, across = (_percentiles([s[i] for s in steps]) if steps else None for i in range(2))
        return cls(num_scans, in_slice, across, dict(Counter(modalities).most_common()), dict(Counter(organs).most_common()))

    @classmethod
    def of_meta(cls, plain: Any, source: str) -> Domain | None:
        """As weights keep it; None where they say nothing.

        Raises:
            BadInput: Something else.
        """
        if plain is None:
            return None
        try:
            values = (plain["spacing_mm"][k] for k in _RANGES)
            in_slice, across = (None if v is None else triple(map(_positive, v)) for v in values)
            modalities, organs = ({str(k): int(n) for k, n in plain[key].items()} for key in ("modalities", "organs"))
            return cls(int(plain["num_scans"]), in_slice, across, modalities, organs)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as err:
            raise BadInput(f"weights {source}: what they say of their training scans cannot be read: write them again") from err

    def as_meta(self) -> dict[str, Any]:
        """Plain types, as a checkpoint keeps it."""
        ranges = (self.in_slice_mm, self.across_mm)
        spacing = {k: None if v is None else list(v) for k, v in zip(_RANGES, ranges, strict=True)}
        counts = {"modalities": dict(self.modalities), "organs": dict(self.organs)}
        return {"num_scans": self.num_scans, "spacing_mm": spacing, **counts}

    def __or__(self, other: Domain) -> Domain:
        """Of both: the outer ends, the larger list's median, the sums."""
        larger, smaller = sorted((self, other), key=lambda d: -d.num_scans)
        both = Counter(self.modalities) + Counter(other.modalities), Counter(self.organs) + Counter(other.organs)
        return Domain(
            self.num_scans + other.num_scans,
            _wider(larger.in_slice_mm, smaller.in_slice_mm),
            _wider(larger.across_mm, smaller.across_mm),
            *both,
        )

    def outside(self, steps: Steps | None, modality: str | None, organ: str | None) -> list[str]:
        """In which of spacing, modality and organ a scan is unlike all of these; what is not known is not outside.

        Args:
            steps: Of the scan as it is shown; None: not to be judged.
            modality, organ: As the list has them.
        """
        ranges = (self.in_slice_mm, self.across_mm)
        pairs = [] if steps is None else [(s, r) for s, r in zip(steps, ranges, strict=True) if r is not None]
        found = ["spacing"] if any(not r[0] / SLACK <= s <= r[2] * SLACK for s, r in pairs) else []
        for name, value, counts in (("modality", modality, self.modalities), ("organ", organ, self.organs)):
            known = sum(counts.values()) >= NEARLY_ALL * self.num_scans > 0
            if value and known and value.lower() not in map(str.lower, counts):
                found.append(name)
        return found

    def words(self) -> str:
        """Such as `1-2 mm MR of the brain`."""
        kinds = [", ".join([*list(c)[:_SHOWN], *(["..."] if len(c) > _SHOWN else [])]) for c in (self.modalities, self.organs)]
        ends = [None if r is None else (r[0], r[2]) for r in (self.in_slice_mm, self.across_mm)]
        return in_words(ends[0], ends[1], kinds[0], kinds[1])

    @property
    def middle_mm(self) -> float | None:
        """The median spacing in a slice."""
        return None if self.in_slice_mm is None else self.in_slice_mm[1]


_RANGES = ("in_slice", "across")


def in_words(in_slice: Steps | None, across: Steps | None, modality: str | None, organ: str | None) -> str:
    """A scan, or the range of several, in a few words."""
    one, two = (None if r is None else "-".join(dict.fromkeys(f"{v:.2g}" for v in r)) for r in (in_slice, across))
    spacing = "" if one is None else f"{one} mm" if one == two or two is None else f"{one} x {two} mm"
    return " ".join(part for part in (spacing, modality or "scans", f"of the {organ}" if organ else "") if part)


def _percentiles(values: Sequence[float]) -> Spacing:
    return triple(float(f"{v:.4g}") for v in np.percentile(values, PERCENTILES))


def _wider(one: Spacing | None, other: Spacing | None) -> Spacing | None:
    """Of the larger list and the smaller."""
    if one is None or other is None:
        return one or other
    return min(one[0], other[0]), one[1], max(one[2], other[2])


def _positive(value: Any) -> float:
    if not is_number(value) or value <= 0:
        raise ValueError(f"{value!r} is no distance")
    return float(value)
