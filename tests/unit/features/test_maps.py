"""Patch maps: colours of principal components, tokens between the patches, and maps at their place in the file."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from dinov2 import Encoder
from dinov2.data.preprocess import to_16_bits
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.features.dense import dense_features
from dinov2.features.pca import fit_basis, otsu
from dinov2.features.placing import at_most, on_stored_grid
from dinov2.features.scans import Scan
from dinov2.features.setup import build_model_for_eval
from dinov2.features.views import View
from tests.unit.features.test_attention import AFFINE, made_scan


@pytest.fixture
def encoder(small_config: Callable[..., DictConfig]) -> Encoder:
    return Encoder(build_model_for_eval(small_config("student.init=xavier"), "random", Runtime(torch.device("cpu"))))


def clusters(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a dark background and a bright body with directions of its own, and brightness."""
    rng = np.random.default_rng(seed)
    bright = np.repeat([-0.9, 0.4], [60, 40])
    tokens = rng.normal(0, 0.02, (100, 12))
    tokens[:, 0] += np.where(bright > 0, -3.0, 3.0)  # opposite to brightness
    tokens[60:, 1:4] += rng.uniform(-1, 1, (40, 3)) * [1.0, 0.6, 0.3]
    return tokens, bright


def test_the_first_component_is_the_foreground_and_the_next_three_its_colours() -> None:
    tokens, bright = clusters()
    basis = fit_basis([tokens], [bright])
    rgb, foreground = basis.colours(basis.scores(tokens))
    assert (foreground == (bright > 0)).all() and (rgb[:60] == 1).all()
    assert rgb[60:].min() == 0 and rgb[60:].max() == 1
    for channel in range(3):
        assert abs(np.corrcoef(rgb[60:, channel], tokens[60:, 1 + channel])[0, 1]) > 0.9


def test_signs_do_not_depend_on_the_linear_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, bright = clusters()
    before = fit_basis([tokens], [bright])
    eigh = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda m: (eigh(m)[0], -eigh(m)[1]))
    np.testing.assert_allclose(fit_basis([tokens], [bright]).axes, before.axes)


def test_a_group_has_one_basis() -> None:
    (one, bright_1), (two, bright_2) = clusters(0), clusters(1)
    joint = fit_basis([one, two], [bright_1, bright_2])
    whole = fit_basis([np.concatenate([one, two])], [np.concatenate([bright_1, bright_2])])
    np.testing.assert_array_equal(joint.axes, whole.axes)
    assert joint.threshold == whole.threshold and not np.allclose(joint.mean, fit_basis([one], [bright_1]).mean)


def test_the_threshold_is_otsus() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(m, s, n) for m, s, n in ((0, 1, 500), (7, 2, 200))])
    between = {t: (values <= t).sum() * (values > t).sum() * (values[values <= t].mean() - values[values > t].mean()) ** 2
               for t in np.sort(values)[:-1]}  # fmt: skip
    best = max(between.values())
    assert between[np.sort(values[values <= otsu(values)])[-1]] > 0.999 * best


@pytest.mark.parametrize("tokens", [np.ones((40, 6)), np.zeros((40, 6)), np.random.default_rng(0).normal(size=(1, 6))])
def test_nothing_to_show_is_one_line(tokens: np.ndarray) -> None:
    with pytest.raises(BadInput, match="all patches look the same to this network|PCA of 1 patch: needs at least 8"):
        fit_basis([tokens], [np.linspace(-1, 1, len(tokens))])


@pytest.mark.parametrize("mode", ["full_image", "sliding_window"])
def test_dense_tokens_are_those_of_the_moved_scan_at_their_places(encoder: Encoder, mode: str) -> None:
    scan = made_scan((1, 12, 10, 3))
    view = View(mode, 8)
    found = dense_features(encoder, scan, view, 2)
    assert found.patch.shape[1:4] == (5, 5, 1)  # centres of patches from the first to the last, every 2 voxels
    plain = encoder.encode_scan(scan, view)
    torch.testing.assert_close(found.patch[:, ::2, ::2], plain.patch)
    moved = Scan("moved", np.pad(scan.voxels, [(0, 0), (0, 0), (0, 2), (0, 1)], constant_values=-32767)[:, 2:10], AFFINE)
    torch.testing.assert_close(found.patch[:, 1::2, ::2], encoder.encode_scan(moved, view).patch)
    centre = found.affine @ torch.tensor([2.0, 0, 0, 1], dtype=torch.float64)  # of patch (1, 0, 0)
    torch.testing.assert_close(centre, plain.affine @ torch.tensor([1.0, 0, 0, 1], dtype=torch.float64))
    for step, message in ((3, "divisor of the network's patch size 4"), (8, "divisor")):
        with pytest.raises(BadInput, match=message):
            dense_features(encoder, scan, view, step)


@pytest.mark.parametrize("view", [View(), View("resize", 8), View("sliding_window", 8)])
def test_a_map_that_is_a_place_has_that_place_in_every_voxel(encoder: Encoder, view: View) -> None:
    """World coordinates of patches, brought to an oblique file whose slice axis is stored first and backwards."""
    stored_shape, margin = (9, 25, 19), (2, 3, 1)
    stored = np.array([[0.0, 1.6, -1.2, 5.0], [0.0, 1.2, 1.6, -8.0], [-3.0, 0.0, 0.0, 20.0], [0, 0, 0, 1]])
    order = np.zeros((4, 4))  # prepared (H, W, D) is stored (Y, Z, X) after a margin
    order[0, 2] = order[1, 0] = order[2, 1] = order[3, 3] = 1
    order[:3, 3] = margin
    values = to_16_bits(np.random.default_rng(0).uniform(-1, 1, (1, 20, 16, 6)).astype(np.float32))
    scan = Scan("oblique", values, stored @ order)
    found = encoder.encode_scan(scan, view)
    affine = found.affine.numpy()
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in found.patch.shape[1:4]], indexing="ij"), -1)
    world = grid @ affine[:3, :3].T + affine[:3, 3]
    placed = on_stored_grid(world, affine, scan, stored_shape, stored)
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in stored_shape], indexing="ij"), -1)
    expected = voxels @ stored[:3, :3].T + stored[:3, 3]
    inside = np.zeros(stored_shape, bool)
    inside[2:8, 3:23, 1:17] = True
    assert (placed[~inside] == 0).all()
    index = np.linalg.solve(affine, np.concatenate([expected, np.ones((*stored_shape, 1))], -1)[..., None])[..., :3, 0]
    between = inside & ((index >= 0) & (index <= np.array(found.patch.shape[1:4]) - 1)).all(-1)  # of patch centres
    assert between.sum() > 200
    np.testing.assert_allclose(placed[between], expected[between], atol=1e-4)
    nearest = on_stored_grid(world, affine, scan, stored_shape, stored, smooth=False)[between]
    half_diagonal = np.linalg.norm(np.linalg.norm(affine[:3, :3], axis=0)) / 2
    assert 0 < np.linalg.norm(nearest - expected[between], axis=-1).max() <= half_diagonal + 1e-6


def test_a_map_of_too_many_cells_is_averaged_and_keeps_its_place() -> None:
    grid = np.stack(np.meshgrid(np.arange(30), np.arange(20), np.arange(12), indexing="ij"), -1)
    world = grid @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    small, affine = at_most(world, AFFINE, 900)
    assert 600 < np.prod(small.shape[:3]) <= 900
    cells = np.stack(np.meshgrid(*[np.arange(n) for n in small.shape[:3]], indexing="ij"), -1)
    spacing = np.linalg.norm(AFFINE[:3, :3], axis=0).max()
    off = cells @ affine[:3, :3].T + affine[:3, 3] - small
    assert np.abs(off).max() < spacing and np.abs(off.mean((0, 1, 2))).max() < 1e-3  # within one cell of before, on no side
    same, unchanged = at_most(world, AFFINE, 7200)
    assert same.shape == world.shape and unchanged is AFFINE
