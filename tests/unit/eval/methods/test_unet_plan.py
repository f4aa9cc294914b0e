"""nnU-Net's rules: published plans from published spacings and sizes, and what is too small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from dinov2.data.downstream.lists import Item
from dinov2.data.downstream.recipes import Recipe, Space
from dinov2.errors import BadInput
from dinov2.eval.methods.unet_plan import UNetPlan, memory, plan_patch, plan_topology, plan_unet
from dinov2.eval.segmentation_3d.unet import UNet3d
from dinov2.geometry import Size3, Spacing, triple

PUBLISHED = {  # of the Decathlon's tasks: spacing, median size, classes, patch; slices last, which nnU-Net has first
    "BraTS": ((1.0, 1.0, 1.0), (138, 169, 138), 4, (128, 128, 128)),
    "Heart": ((1.25, 1.25, 1.37), (232, 320, 115), 2, (160, 192, 80)),
    "Liver": ((0.767578, 0.767578, 1.0), (512, 512, 482), 3, (128, 128, 128)),
    "Hippocampus": ((1.0, 1.0, 1.0), (35, 50, 36), 3, (40, 56, 40)),
    "Prostate": ((0.625, 0.625, 3.6), (319, 320, 20), 3, (256, 320, 20)),
    "Lung": ((0.785, 0.785, 1.244), (512, 512, 252), 2, (160, 192, 80)),
    "Spleen": ((0.793, 0.793, 1.6), (512, 512, 187), 2, (160, 192, 64)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_patches_come_out(name: str) -> None:
    spacing, shape, classes, patch = PUBLISHED[name]
    found = plan_patch(spacing, shape, classes)
    assert sorted(found[:2]) == sorted(patch[:2]) and found[2] == patch[2]
    divisor = plan_topology(spacing, found).divisor
    assert all(n % d == 0 for n, d in zip(found, divisor, strict=True))


def test_a_coarse_axis_is_halved_later_and_seen_by_kernels_of_1_first() -> None:
    """The prostate's published network."""
    plan = plan_topology((0.61, 0.61, 3.6), (320, 256, 20))
    assert [s[2] for s in plan.strides] == [1, 1, 1, 2, 2, 1, 1] and [s[0] for s in plan.strides] == [1, 2, 2, 2, 2, 2, 2]
    assert [k[2] for k in plan.kernels] == [1, 1, 3, 3, 3, 3, 3] and {k[0] for k in plan.kernels} == {3}
    assert plan.divisor == (64, 64, 4)


def test_one_axis_alone_is_halved_only_above_12_voxels() -> None:
    assert plan_topology((1.0, 1.0, 1.0), (11, 4, 4)).divisor == (1, 1, 1)
    assert plan_topology((1.0, 1.0, 1.0), (12, 4, 4)).divisor == (2, 1, 1)


def test_the_patch_shrinks_until_its_maps_fit() -> None:
    spacing: Spacing = (1.0, 1.0, 1.0)
    assert (
        memory(plan_topology(spacing, (128,) * 3), (128,) * 3, 4)
        < 560_000_000
        < memory(plan_topology(spacing, (160,) * 3), (160,) * 3, 4)
    )


def test_the_full_network_has_nnunets_numbers() -> None:
    plan = plan_topology((1.0, 1.0, 1.0), (128, 128, 128))
    with torch.device("meta"):
        net = UNet3d(plan, 32, 4, 3)
        assert net(torch.empty(1, 4, 128, 128, 128)).shape == (1, 3, 128, 128, 128)
    assert 31.1e6 < sum(p.numel() for p in net.parameters()) < 31.3e6  # "31.2 M", as published


def save(folder: Path, shapes: list[Size3], spacing: Spacing) -> list[Item]:
    items = []
    for i, shape in enumerate(shapes):
        path = folder / f"{i}.nii.gz"
        nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.diag([*spacing, 1.0])), path)
        items.append(Item((str(path),), None, f"case{i}"))
    return items


def test_a_list_is_planned_from_its_headers_on_the_recipes_grid(tmp_path: Path) -> None:
    recipe = Recipe(classes={0: "background", 1: "organ"}, name="organs")
    items = save(tmp_path, [(20, 24, 9), (24, 30, 10), (90, 80, 70)], (1.0, 1.0, 3.0))
    planned = plan_unet(items, recipe, 1.0)
    assert planned.patch == (24, 32, 10) and planned.plan.divisor == (4, 4, 2)  # rounded up from the median case
    finer = plan_unet(items, Recipe(classes={0: "background", 1: "organ"}, space=Space(spacing_mm=[1, 1, 1]), name="o"), 1.0)
    assert finer.patch[2] > planned.patch[2] and finer.plan.kernels[0] == (3, 3, 3) != planned.plan.kernels[0]
    assert plan_unet(items, recipe, 1.0, 16).patch == (16, 16, 16)
    with pytest.raises(BadInput, match="organs: a U-Net needs a patch of 16 voxels along two axes at least, it is 8 x 8 x 8"):
        plan_unet(items, recipe, 1.0, 8)


def test_a_plan_survives_its_file_and_others_are_refused() -> None:
    plan = plan_topology((1.0, 1.0, 3.0), (40, 56, 40))
    assert UNetPlan.from_plain(plan.as_plain()) == plan
    bad: list[Any] = [None, {}, {"strides": [[1, 1, 1]] * 99, "kernels": [[3, 3, 3]] * 99}, {**plan.as_plain(), "kernels": []}]
    bad += [{**plan.as_plain(), "strides": [[1, 1, 10**6]] * len(plan.strides)}]
    for plain in bad:
        with pytest.raises((ValueError, TypeError, KeyError)):
            UNetPlan.from_plain(plain)
    assert triple(plan.strides[0]) == (1, 1, 1)
