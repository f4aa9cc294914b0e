"""A small labelled set of brain volumes, made from the real T1 template and tissue maps that nilearn ships.

Every subject is the template under a random affine and elastic deformation; every volume of a subject has its own tissue
contrasts, bias field, noise and slice thickness. The label map says of each voxel of the brain in which quarter of the
template it lies, which neither intensities nor the position in a crop tell.

Template: ICBM 152 nonlinear symmetric 2009a (Fonov et al.), free for any use with its copyright notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from dinov2.data.datalist import write_datalist
from dinov2.files import replacing
from dinov2.optional import needed_for

SPACING_MM = 1.5
QUARTERS = {1: "lower back", 2: "lower front", 3: "upper back", 4: "upper front"}
_EXTENT_MM = (150, 186, 150)  # around the template's brain
_THICK_SLICE_P = 0.25


@dataclass(frozen=True)
class Case:
    """One generated volume with its labels (0 outside, then QUARTERS), both on disk."""

    image: Path
    label: Path
    subject: int


@dataclass(frozen=True)
class Template:
    """Tissue probabilities [4, X, Y, Z] (outside, CSF, GM, WM) and T1 intensity in [0, 1], 1 mm."""

    tissue: np.ndarray
    t1: np.ndarray


def load_template() -> Template:
    """The template of nilearn; CSF is what the brain mask holds beside grey and white matter."""
    with needed_for("the quick start without --data"):
        from nilearn import datasets  # heavy, and only the quick start needs it

    maps = (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    t1, gm, wm = (np.asarray(load(resolution=1).get_fdata(), dtype=np.float32) for load in maps)
    mask = np.asarray(datasets.load_mni152_brain_mask(resolution=1).get_fdata(), dtype=np.float32)
    gm, wm = gm * mask, wm * mask
    csf = np.clip(mask - gm - wm, 0, 1)
    return Template(np.stack([1 - np.clip(csf + gm + wm, 0, 1), csf, gm, wm]), t1 * mask)


def deform(
    template: Template, rng: np.random.Generator, spacing_mm: float = SPACING_MM
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A new subject: tissue probabilities [4, X, Y, Z], T1 and QUARTERS [X, Y, Z] (uint8) on a grid of `spacing_mm`.

    Rotation up to 0.25 rad and scale 0.88-1.12 about each axis; elastic displacement of a few mm, smooth over 25 mm.
    """
    shape = [2 * round(mm / spacing_mm / 2) for mm in _EXTENT_MM]  # even, for slices of twice the thickness
    grid = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in shape], indexing="ij")).astype(np.float32)
    grid *= spacing_mm
    matrix = np.diag(1 / rng.uniform(0.88, 1.12, 3))
    for axis in range(3):
        angle = rng.uniform(-0.25, 0.25)
        turn = np.eye(3)
        a, b = [i for i in range(3) if i != axis]
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    where = np.einsum("ij,jxyz->ixyz", matrix.astype(np.float32), grid)
    coarse = rng.normal(0, 4.0, (3, 6, 7, 6))
    where += np.stack([spline(c, shape) for c in coarse]).astype(np.float32)
    brain = template.tissue[0] < 0.5
    centre = np.array(
        [np.mean(np.flatnonzero(brain.any(axis=tuple(j for j in range(3) if j != i)))[[0, -1]]) for i in range(3)]
    )
    where += (centre + rng.uniform(-3, 3, 3)).astype(np.float32)[:, None, None, None]
    inside = [ndimage.map_coordinates(m, where, order=1) for m in template.tissue[1:]]
    tissue = np.stack([np.clip(1 - sum(inside), 0, 1), *inside])
    _, front, upper = (where[axis] > centre[axis] for axis in range(3))
    quarter = np.where(tissue[0] < 0.5, 1 + front + 2 * upper, 0).astype(np.uint8)
    return tissue, ndimage.map_coordinates(template.t1, where, order=1), quarter


def spline(coarse: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Cubic interpolation of a few values to a whole volume: scipy's `zoom`, one axis after the other, which is less work."""
    for axis, n in enumerate(shape):
        weights = ndimage.zoom(np.eye(coarse.shape[axis]), (n / coarse.shape[axis], 1), order=3)  # [n, coarse n]
        coarse = np.moveaxis(np.tensordot(weights, coarse, (1, axis)), 0, axis)
    return coarse


def paint(tissue: np.ndarray, t1: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One scan of a subject: contrast per tissue, a share of the template's own texture, bias field, noise; 0 outside.

    CSF, grey and white matter get darker or brighter in this order (as in T2- or T1-weighted scans), by random steps.
    """
    steps = np.cumsum(rng.uniform(0.15, 0.4, 3))
    levels = np.array([0.0, *(steps if rng.random() < 0.5 else steps[::-1])], dtype=np.float32)
    inside = 1 - tissue[0]
    mean_t1 = np.array([(p * t1).sum() / max(p.sum(), 1) for p in tissue], dtype=np.float32)
    texture = t1 - np.einsum("c,cxyz->xyz", mean_t1, tissue)
    image = np.einsum("c,cxyz->xyz", levels, tissue) + rng.uniform(-0.6, 0.6) * texture * inside
    field = spline(rng.normal(0, 0.15, (3, 3, 3)), image.shape)
    image = image * np.exp(field) + rng.normal(0, rng.uniform(0.01, 0.05), image.shape)
    return np.clip(image, 0, None) * (inside > 0.5)


def thicken(
    image: np.ndarray, labels: np.ndarray, rng: np.random.Generator, spacing_mm: float = SPACING_MM
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Sometimes slices of twice the thickness along a random axis; image, labels and spacing (mm)."""
    spacing = [spacing_mm] * 3
    if rng.random() < _THICK_SLICE_P:
        axis = int(rng.integers(3))
        image, labels = np.moveaxis(image, axis, 0), np.moveaxis(labels, axis, 0)
        image, labels = (np.moveaxis(x, 0, axis) for x in ((image[0::2] + image[1::2]) / 2, labels[0::2]))
        spacing[axis] *= 2
    return image, labels, spacing


def generate(
    folder: Path, num_subjects: int, volumes_per_subject: int, seed: int, spacing_mm: float = SPACING_MM
) -> Iterator[Case]:
    """Write the volumes of all subjects and yield them; what is there already is not written again.

    Args:
        folder: Gets `images/` and `labels/`.
        num_subjects, volumes_per_subject: Size of the set.
        seed: Everything follows from it; a subject does not depend on how many there are.
        spacing_mm: Edge of a voxel.
    """
    template = None
    for subject in range(num_subjects):
        names = [f"subject{subject:02d}_scan{scan}.nii.gz" for scan in range(volumes_per_subject)]
        cases = [Case(folder / "images" / n, folder / "labels" / n, subject) for n in names]
        if not all(c.label.exists() for c in cases):
            template = template or load_template()
            tissue, t1, quarters = deform(template, np.random.default_rng([seed, subject]), spacing_mm)
            for scan, case in enumerate(cases):
                rng = np.random.default_rng([seed, subject, scan + 1])
                _save(case, *thicken(paint(tissue, t1, rng), quarters, rng, spacing_mm))
        yield from cases


def _save(case: Case, image: np.ndarray, label: np.ndarray, spacing: list[float]) -> None:
    affine = np.diag([*spacing, 1.0])
    for path, voxels in ((case.image, np.round(image * 1000).astype(np.int16)), (case.label, label)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            nib.save(nib.Nifti1Image(voxels, affine), temporary)


def write_list(path: Path, cases: list[Case]) -> None:
    """The pretraining datalist of generated cases."""
    images = [nib.Nifti1Image.from_filename(c.image) for c in cases]
    write_datalist(
        path,
        (
            {
                "image": str(c.image),
                "shape": list(image.shape),
                "spacing": [float(z) for z in image.header.get_zooms()],
                "modality": "synthetic MR",
                "patient": f"subject{c.subject:02d}",
            }
            for c, image in zip(cases, images, strict=True)
        ),
    )
