"""The dense read-out and region retrieval on volumes whose answers are known."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2.data.preprocess import to_16_bits
from dinov2.eval.measures.dense_readout import (
    LabelledCrops,
    ceiling,
    class_shares,
    dice_of_patches,
    fit_logistic,
    random_crops,
    raw_features,
    read_out,
)
from dinov2.eval.measures.region_retrieval import MAX_ANGLE, Places, median_errors, places_of, retrieval_errors
from dinov2.features.scans import Scan

P = 4


def labelled(seed: int, num_crops: int = 6) -> LabelledCrops:
    """Crops [C, 1, 8, 12, 16] whose brightness is their label, blocks of whole patches."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.integers(3, size=(num_crops, 2, 3, 4)))
    labels = coarse
    for axis in (1, 2, 3):
        labels = labels.repeat_interleave(P, axis)
    return LabelledCrops(labels[:, None].float() - 1 + 0.01 * torch.randn(labels[:, None].shape), labels)


def patch_means(windows: Tensor) -> Tensor:
    """[C, h, w, d, 2]: a patch's mean and the square of it."""
    mean = torch.nn.functional.avg_pool3d(windows, P)[:, 0, ..., None]
    return torch.cat([mean, mean**2], -1)


def test_features_that_tell_the_label_reach_the_ceiling_and_useless_ones_do_not() -> None:
    torch.manual_seed(0)
    parts = {name: [labelled(10 * i + j) for j in range(3)] for i, name in enumerate(("training", "validation", "test"))}
    good = read_out(patch_means, parts, (1, 3), P, 3)
    bad = read_out(lambda w: torch.randn(*patch_means(w).shape[:4], 8), parts, (3,), P, 3)
    assert ceiling(parts["test"], P, 3) == [1.0] * 3
    assert min(good[1] + good[3]) > 0.99
    assert max(bad[3]) < 0.6


def test_a_read_out_does_not_depend_on_the_features_units() -> None:
    features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    shares = torch.nn.functional.one_hot((features[:, 0] + features[:, 1] > 0).long(), 2).float()
    units, zero = torch.tensor([0.01, 1.0, 10.0, 300.0]), torch.tensor([5.0, -1.0, 0.0, 100.0])
    plain = fit_logistic(features, shares, 0.1)(features)
    torch.testing.assert_close(
        fit_logistic(features * units + zero, shares, 0.1)(features * units + zero), plain, atol=0.02, rtol=0
    )
    assert float((plain.argmax(1) == shares.argmax(1)).float().mean()) > 0.9


def test_dice_counts_every_foreground_class_that_occurs() -> None:
    labels = torch.zeros(1, 8, 8, 8, dtype=torch.long)
    labels[:, :4] = 1
    scores = class_shares(labels, P, 3)
    assert dice_of_patches(scores, labels) == 1.0
    half = scores.clone()
    half[0, 0, 0] = torch.tensor([0.0, 0.0, 1.0])  # half of class 1 called class 2, which is nowhere
    assert dice_of_patches(half, labels) == pytest.approx((2 / 3 + 0) / 2)
    assert np.isnan(dice_of_patches(torch.zeros(1, 2, 2, 2, 3), torch.zeros(1, 8, 8, 8, dtype=torch.long)))


def test_raw_features_hold_the_patch_its_neighbours_and_its_place() -> None:
    windows = torch.arange(8 * 12 * 4.0).view(1, 1, 8, 12, 4)
    found = raw_features(windows, P)
    assert found.shape == (1, 2, 3, 1, 64 + 27 + 3)
    torch.testing.assert_close(found[0, 1, 2, 0, :64], windows[0, 0, 4:8, 8:12].flatten())
    assert found[0, 1, 2, 0, 64 + 13] == windows[0, 0, 4:8, 8:12].mean()  # the middle of the 27 is the patch itself
    assert found[0, 0, 2, 0, -3:].tolist() == [-1.0, 1.0, -1.0]


def test_crops_come_with_the_labels_of_their_own_voxels(tmp_path: Path) -> None:
    """Also where the slice axis moves and the scan is smaller than the crop."""
    rng = np.random.default_rng(0)
    labels = rng.integers(1, 200, (9, 30, 26)).astype(np.uint8)
    for name, voxels in (("image", labels.astype(np.int16)), ("label", labels)):
        nib.save(nib.Nifti1Image(voxels, np.diag([3.0, 1.0, 1.0, 1.0])), tmp_path / f"{name}.nii.gz")
    crops = random_crops(tmp_path / "image.nii.gz", tmp_path / "label.nii.gz", (24, 24, 12), 5, (0,))
    assert crops.windows.shape == (5, 1, 24, 24, 12) and crops.labels.shape == (5, 24, 24, 12)
    inside = crops.labels > 0
    assert (crops.windows[:, 0][~inside] == -1).all() and inside.any() and not inside.all()
    brightness = torch.corrcoef(torch.stack([crops.windows[:, 0][inside], crops.labels[inside].float()]))[0, 1]
    assert brightness > 0.999


def made_scan(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Scan:
    voxels = np.random.default_rng(0).uniform(-0.9, 1, (1, *shape)).astype(np.float32)
    return Scan("made", to_16_bits(voxels), np.diag([*spacing, 1.0]))


def test_crops_lie_where_their_centres_say() -> None:
    scan = made_scan((20, 24, 30), (2.0, 1.0, 0.5))
    places = places_of(scan, 8, 6)
    assert places.windows.shape == (3 * 3 * 4, 1, 8, 8, 8)
    assert places.centres_mm[0].tolist() == [7.0, 3.5, 1.75] and places.extent_mm.tolist() == [40.0, 24.0, 15.0]
    torch.testing.assert_close(places.windows[-1, 0], scan.data[0, 12:20, 12:20, 18:26])


def test_a_turned_scan_knows_where_its_crops_came_from() -> None:
    """In a volume whose value is a linear function of the place, a turned crop's mean is its centre's value."""
    spacing = np.array([2.0, 1.0, 1.5])
    grid = np.stack(np.meshgrid(*[np.arange(n) * s for n, s in zip((30, 40, 36), spacing, strict=True)], indexing="ij"))
    values = np.einsum("i,ixyz->xyz", [0.01, -0.012, 0.006], grid)
    scan = Scan("made", to_16_bits((values / 2)[None].astype(np.float32)), np.diag([*spacing, 1.0]))
    rng = np.random.default_rng(3)
    places = places_of(scan, 4, 4, rng, min_foreground=1.0)
    again = np.random.default_rng(3)
    again.uniform(-MAX_ANGLE, MAX_ANGLE, 3)
    gamma = np.exp(again.uniform(-0.4, 0.4))
    expected = places.centres_mm @ [0.01, -0.012, 0.006] / 2
    shown = 2 * (((places.windows + 1) / 2) ** (1 / gamma)).mean((1, 2, 3, 4)).numpy() - 1
    inside = ((places.centres_mm > 8) & (places.centres_mm < places.extent_mm - 8)).all(axis=1)
    assert inside.sum() > 20
    np.testing.assert_allclose(shown[inside], expected[inside], atol=2e-3)


def test_features_of_the_place_retrieve_it_and_others_do_not() -> None:
    small, large = made_scan((20, 24, 30), (1.0, 1.0, 1.0)), made_scan((40, 48, 60), (1.0, 1.0, 1.0))
    asking, searched = [[places_of(s, 8, step) for s in (small, large)] for step in (6, 4)]

    def of_place(places: Places) -> Tensor:
        share = torch.from_numpy(places.centres_mm / places.extent_mm)
        anchors = torch.cartesian_prod(*[torch.linspace(0.1, 0.9, 5, dtype=torch.double)] * 3)
        return torch.exp(-(torch.cdist(share, anchors) ** 2) / 0.05)

    errors = retrieval_errors(asking[0], of_place(asking[0]), searched[1], of_place(searched[1]))
    assert len(errors) == len(asking[0].windows)
    generator = torch.Generator().manual_seed(0)
    noise = [[torch.randn(len(p.windows), 16, generator=generator) for p in places] for places in (asking, searched)]
    random = median_errors(asking, noise[0], searched, noise[1])
    assert np.median(errors) < 4 and min(random) > 8
