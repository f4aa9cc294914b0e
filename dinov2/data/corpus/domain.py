"""What a list's scans are like, for the weights that are trained on them; no file is read."""

from __future__ import annotations

from collections.abc import Sequence

from dinov2.checkpointer.domain import Domain, Steps
from dinov2.data.corpus.index.metadata import normal_modality
from dinov2.data.datalist import Entry
from dinov2.data.preprocess import slice_axis
from dinov2.geometry import Spacing


def domain_of(entries: Sequence[Entry]) -> Domain:
    """Spacings, modalities and organs of scans, as far as their list says them."""
    kinds = [kind_of(e) for e in entries]
    return Domain.of(
        len(entries),
        [steps_of(e.spacing_mm) for e in entries if e.spacing_mm is not None],
        [modality for modality, _ in kinds if modality],
        [organ for _, organ in kinds if organ],
    )


def kind_of(entry: Entry) -> tuple[str | None, str | None]:
    """Modality and organ that a list says of a scan, in the index's words."""
    modality, organ = (entry.extra.get(key) for key in ("modality", "organ"))
    return normal_modality(str(modality)) if modality else None, str(organ).lower() if organ else None


def steps_of(spacing_mm: Spacing) -> Steps:
    """Distance of voxels in a slice, and of slices."""
    axis = slice_axis(spacing_mm)
    return sum(s for i, s in enumerate(spacing_mm) if i != axis) / 2, spacing_mm[axis]
