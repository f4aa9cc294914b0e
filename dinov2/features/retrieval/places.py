"""The same place in another scan: where a window of patch tokens around a place of one looks most alike.

A window is a cube of points along the axes of the world, at which the query's tokens are read (linearly between patches). In
another scan it is laid around every patch, whatever the axes and spacing of that scan's grid are, and the place is where the
mean of the points' cosines is largest.

Shapes: h w d patches, K points of a window, E numbers of a token (all layers that are kept).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from scipy import ndimage

from dinov2.errors import BadInput

WINDOW = 4  # points along an edge, one a patch of the query


@dataclass(frozen=True)
class TokenGrid:
    """A scan's patch tokens and where they lie.

    Attributes:
        tokens: [h, w, d, E] float32 of length 1, about the scan's mean token: what all its patches share tells no place.
        affine: [4, 4] grid index (a patch's centre) -> mm.
    """

    tokens: np.ndarray
    affine: np.ndarray

    @classmethod
    def of(cls, patch: np.ndarray, affine: np.ndarray, name: str) -> TokenGrid:
        """From tokens as the encoder gives them, [h, w, d, E].

        Raises:
            BadInput: They are not finite, or there is one patch, so that there is nothing to choose from.
        """
        if patch.ndim != 4 or affine.shape != (4, 4) or not (np.isfinite(patch).all() and np.isfinite(affine).all()):
            raise BadInput(
                f"{name}: its patch tokens are not finite or of another shape than [h, w, d, E]: embed the scan again"
            )
        if np.prod(patch.shape[:3]) < 2:
            raise BadInput(f"{name}: has a grid of one patch, which has no places: use smaller patches or windows")
        about_mean = patch.astype(np.float32) - patch.mean((0, 1, 2), dtype=np.float32)
        length = np.linalg.norm(about_mean, axis=-1, keepdims=True)
        return cls(about_mean / np.maximum(length, 1e-12), affine.astype(np.float64))

    @property
    def step_mm(self) -> float:
        """Distance of neighbouring patches, the geometric mean of the three axes'."""
        return float(abs(np.linalg.det(self.affine[:3, :3])) ** (1 / 3))

    def indices(self, points_mm: np.ndarray) -> np.ndarray:
        """Grid indices [K, 3], not rounded, of points [K, 3]."""
        inverse = np.linalg.inv(self.affine)
        return points_mm @ inverse[:3, :3].T + inverse[:3, 3]

    def holds(self, place_mm: np.ndarray) -> bool:
        """Whether a place lies in one of the patches."""
        (at,) = self.indices(place_mm[None])
        return bool(((at >= -0.5) & (at <= np.array(self.tokens.shape[:3]) - 0.5)).all())

    def corners_mm(self) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest x, y, z of its patches."""
        ends = np.array(list(itertools.product(*[(-0.5, n - 0.5) for n in self.tokens.shape[:3]])))
        ends_mm = ends @ self.affine[:3, :3].T + self.affine[:3, 3]
        return ends_mm.min(0), ends_mm.max(0)


def read_grid(path: Path) -> TokenGrid:
    """From a file of `dinov2 embed --patch-tokens`.

    Raises:
        BadInput: It is not there, or damaged.
    """
    try:
        with np.load(path) as found:
            return TokenGrid.of(found["patch"], found["affine"], str(path))
    except (OSError, KeyError, EOFError, BadZipFile) as err:
        raise BadInput(f"{path}: no such patch tokens, or damaged ones: make the table again with --patch-tokens") from err


class Window(NamedTuple):
    """What a place looks like.

    Attributes:
        tokens: [K, E]; zeros where the window leaves the scan.
        offsets_mm: [K, 3] from the place.
    """

    tokens: np.ndarray
    offsets_mm: np.ndarray


def window_around(grid: TokenGrid, place_mm: np.ndarray, edge: int = WINDOW) -> Window:
    """The tokens around a place, `edge` points along each axis of the world, a patch apart."""
    line = (np.arange(edge) - (edge - 1) / 2) * grid.step_mm
    offsets = np.array(list(itertools.product(line, line, line)))  # [K, 3]
    at = grid.indices(place_mm + offsets)
    num = grid.tokens.shape[-1]
    where = [*(np.repeat(axis[:, None], num, 1) for axis in at.T), np.repeat(np.arange(num)[None], len(at), 0)]
    return Window(ndimage.map_coordinates(grid.tokens, where, order=1, mode="constant", output=np.float32), offsets)


def best_place(window: Window, grid: TokenGrid) -> tuple[np.ndarray, float]:
    """The place of a scan that looks most like a window's middle.

    Returns:
        [3] in mm, and its distance: 1 - the mean cosine of the window's points, those outside either scan counting 0.
    """
    shape = grid.tokens.shape[:3]
    cosines = grid.tokens @ window.tokens.T  # [h, w, d, K]
    shifts = window.offsets_mm @ np.linalg.inv(grid.affine[:3, :3]).T  # [K, 3] in patches of this grid
    total = np.zeros(shape)
    for k, shift in enumerate(shifts):  # the cosine at each patch's own k-th point
        total += ndimage.shift(cosines[..., k], -shift, order=1, mode="constant")
    best = np.array(np.unravel_index(total.argmax(), shape))
    return grid.affine[:3, :3] @ best + grid.affine[:3, 3], 1 - float(total.max()) / len(shifts)
