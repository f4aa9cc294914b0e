"""Three planes of a scan: upright and in true proportions whatever its axes are, a cross where it is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from dinov2.visual.planes import GAP, three_planes

UPRIGHT = np.array([[2.0, 0, 0, -20], [0, 1, 0, -15], [0, 0, 4, -8], [0, 0, 0, 1]])
TURNED = np.array([[0, 0, -2.0, 20], [1, 0, 0, -15], [0, 4.0, 0, -8], [0, 0, 0, 1]])  # axes A, S, L
SPOT_MM = np.array([10.0, 3.0, 12.0])  # right, in front, above


def volume(affine: np.ndarray) -> np.ndarray:
    """Black, 42 x 31 x 44 mm, with a white voxel at the spot."""
    shape = np.abs(np.linalg.inv(affine[:3, :3]) @ [42, 31, 44]).round().astype(int)
    found = np.zeros(shape, np.float32)
    at = np.linalg.inv(affine[:3, :3]) @ (SPOT_MM - affine[:3, 3])
    found[tuple(at.round().astype(int))] = 1
    return found


@pytest.mark.parametrize("affine", [UPRIGHT, TURNED], ids=["RAS", "ASL"])
def test_planes_are_upright_and_in_true_proportions(affine: np.ndarray) -> None:
    image = three_planes(volume(affine), affine, SPOT_MM)
    step = 44 / image.shape[0]  # mm a pixel
    widths = [round(mm / step) for mm in (31, 42, 42)]
    assert image.shape[1] == pytest.approx(sum(widths) + 2 * GAP, abs=2) and image.shape[2] == 3
    # low x, y, z of the volume's edge are -21, -15.5, -10; in the axial plane 31 mm are padded to 44
    wanted = {0: (44 - 22, 18.5), widths[0] + GAP: (44 - 22, 31), widths[0] + widths[1] + 2 * GAP: (6.5 + 31 - 18.5, 31)}
    for left, (down_mm, right_mm) in wanted.items():
        part = image[:, left : left + widths[1], 0]
        rows, columns = np.nonzero(part > 0.9 * part.max())
        assert rows.mean() * step == pytest.approx(down_mm, abs=0.6) and columns.mean() * step == pytest.approx(
            right_mm, abs=0.6
        )


def test_a_cross_points_at_the_place_and_leaves_it_free() -> None:
    plain, marked = (three_planes(volume(UPRIGHT), UPRIGHT, SPOT_MM, is_marked) for is_marked in (False, True))
    changed = (plain != marked).any(-1)
    assert changed.sum() > 100 and np.ptp(marked[changed], axis=0).max() == 0, "one colour"
    white = plain[..., 0] > 0.9
    assert white.any() and not changed[white].any()
