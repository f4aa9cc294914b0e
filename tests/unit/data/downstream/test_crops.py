"""Training crops: deterministic, inside the volume, image and label turned alike, augmented as the recipe says."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinov2.data.downstream.cases import Case
from dinov2.data.downstream.crops import BACKGROUND, central_cube, is_smaller, training_crops, training_cube
from dinov2.data.downstream.lists import Item
from dinov2.data.downstream.recipes import ONE_OF, Recipe, Training, load_recipe
from dinov2.data.volumes.grids import GridMap
from dinov2.errors import BadInput
from dinov2.streams import Kind, stream

SHAPE = (13, 11, 9)
PLAIN = Training(crops_per_volume=4)


def recipe(**train: object) -> Recipe:
    return Recipe(classes={0: "background", 1: "organ"}, train=dataclasses.replace(PLAIN, **train), name="r")


def case(label: torch.Tensor | None = None, shape: tuple[int, int, int] = SHAPE) -> Case:
    """Every voxel of the image has its own value above -1, and by default the label says which it is."""
    count = math.prod(shape)
    number = torch.arange(count).reshape(1, *shape)
    image = number.float() / count - 0.5
    return Case(
        Item(("a",), "b", "one"),
        torch.cat([image, image / 2]),
        number.to(torch.int16) if label is None else label,
        GridMap(shape, np.eye(4), "RAS", None),
    )


def value_of(label: torch.Tensor, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    return label.float() / math.prod(shape) - 0.5


def draw(index: int) -> np.random.Generator:
    return stream(7, Kind.SAMPLE, index)


@pytest.mark.parametrize("crop", ["random", "pos_neg"])
def test_image_and_label_stay_voxel_by_voxel_together(crop: str) -> None:
    """Whatever flips and turns came: each voxel of the image, of both channels, still has the value of its label."""
    kinds = set()
    for i in range(30):
        for made in training_crops(case(), recipe(crop=crop, flip_p=0.5, rot90_p=0.5), 5, draw(i)):
            assert made["image"].shape == (2, 5, 5, 5) and made["label"].shape == (1, 5, 5, 5)
            assert torch.equal(made["image"][:1], value_of(made["label"])) and torch.equal(
                made["image"][1:] * 2, made["image"][:1]
            )
            kinds.add(tuple(int(made["label"].long().diff(dim=d).flatten()[0]) for d in (1, 2, 3)))
    assert len(kinds) == 16  # 8 flips, each with the first two axes in place or swapped


def test_crops_that_are_no_cubes_keep_their_edges_and_voxels_whatever_turns_come() -> None:
    turned = set()
    for i in range(20):
        for made in training_crops(case(), recipe(crop="pos_neg", flip_p=0.0, rot90_p=0.7), (4, 6, 3), draw(i)):
            assert made["image"].shape == (2, 4, 6, 3) and made["label"].shape == (1, 4, 6, 3)
            assert torch.equal(made["image"][:1], value_of(made["label"]))
            turned.add(int(made["label"].long().diff(dim=1).flatten()[0]))
    assert len(turned) == 2, "as it was, and by a half turn"
    square = [
        m["label"].long().diff(dim=1).flatten()[0] for m in training_crops(case(), recipe(rot90_p=1.0), (4, 4, 3), draw(0))
    ]
    assert len(set(map(int, square))) > 1, "quarter turns where they keep the edges"


def test_the_same_stream_gives_the_same_crops_and_another_gives_others() -> None:
    everything = recipe(crop="pos_neg", flip_p=0.5, rot90_p=0.5, scale=0.1, shift=0.1)
    one, same, other = (training_crops(case(), everything, 5, draw(i)) for i in (3, 3, 4))
    for a, b, c in zip(one, same, other, strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
        assert not torch.equal(a["image"], c["image"])


def test_random_crops_reach_every_place() -> None:
    starts = [set(), set(), set()]
    for i in range(150):
        for made in training_crops(case(), recipe(), 5, draw(i)):
            first = np.unravel_index(int(made["label"][0, 0, 0, 0]), SHAPE)
            for axis in range(3):
                starts[axis].add(int(first[axis]))
    assert starts == [set(range(n - 5 + 1)) for n in SHAPE]


def test_half_of_the_pos_neg_crops_are_centred_on_a_label_and_none_on_the_air_around() -> None:
    label = torch.zeros(1, 31, 31, 31, dtype=torch.int16)
    label[0, 15, 15, 15] = 1
    made = case(label, (31, 31, 31))
    made.image[:, :10] = -1  # air
    centres = [
        (c["label"][0, 2, 2, 2].item(), c["image"][0, 2, 2, 2].item())
        for i in range(100)
        for c in training_crops(made, recipe(crop="pos_neg"), 5, draw(i))
    ]
    assert 0.42 < sum(labelled for labelled, _ in centres) / 400 < 0.58
    # a centre in air can only come from the volume's own border, which shifts the crop
    assert all(value > -1 for _, value in centres)


def test_a_case_without_a_label_of_the_wanted_kind_takes_the_other() -> None:
    for value in (0, 1):
        made = training_crops(case(torch.full((1, *SHAPE), value, dtype=torch.int16)), recipe(crop="pos_neg"), 5, draw(0))
        assert len(made) == 4


def test_a_case_without_a_label_map_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="one: has no label map"):
        training_crops(dataclasses.replace(case(), label=None), recipe(), 5, draw(0))


@pytest.mark.parametrize("crop", ["random", "pos_neg"])
def test_a_volume_smaller_than_the_crop_is_padded_on_both_sides_with_background(crop: str) -> None:
    small = case(shape=(4, 9, 3))
    assert is_smaller(small, 7) and not is_smaller(small, 3)
    assert is_smaller(case(), (13, 11, 10)) and not is_smaller(case(), (13, 11, 9)), "each axis by its own edge"
    for made in training_crops(small, recipe(crop=crop), 7, draw(0)):
        inside = made["image"][0] > -1
        assert inside.any((1, 2)).tolist() == [False, False, True, True, True, True, False]  # 2 of 3 before
        assert inside.any((0, 1)).tolist() == [False, False, True, True, True, False, False]
        assert not made["label"][0][~inside].any() and (made["image"][:, ~inside] == -1).all()


def test_foreground_crops_leave_out_the_air_around() -> None:
    made = case()
    made.image[:, :3], made.image[:, :, 8:] = -1, -1
    inside = recipe(foreground_crop=True)
    values = torch.cat([c["image"][0].flatten() for i in range(40) for c in training_crops(made, inside, 3, draw(i))])
    assert (values > -1).all()


def test_intensities_are_scaled_and_shifted_within_range_and_as_often_as_said() -> None:
    def lines(**train: float) -> np.ndarray:
        """Slope and offset against the label's value, a row per crop."""
        rows = []
        for i in range(60):
            for made in training_crops(case(), recipe(**train), 5, draw(i)):
                rows.append(np.polyfit(value_of(made["label"]).flatten().numpy(), made["image"][0].flatten().numpy(), 1))
        return np.array(rows)

    scaled = lines(scale=0.1)
    assert np.abs(scaled[:, 0] - 1).max() <= 0.1 + 1e-4 and scaled[:, 0].min() < 0.92 and scaled[:, 0].max() > 1.08
    assert np.abs(scaled[:, 1]).max() < 1e-4
    shifted = lines(shift=0.2, shift_p=0.5)
    assert np.abs(shifted[:, 0] - 1).max() < 1e-3 and 0.15 < np.abs(shifted[:, 1]).max() <= 0.2 + 1e-4
    assert 0.38 < (np.abs(shifted[:, 1]) > 1e-4).mean() < 0.62


@pytest.mark.parametrize("axes", [[0], [1, 2]])
def test_only_the_axes_that_may_be_flipped_are(axes: list[int]) -> None:
    steps = torch.tensor([11 * 9, 9, 1])
    flipped = torch.zeros(3, dtype=torch.bool)
    for i in range(20):
        for made in training_crops(case(), recipe(flip_p=0.5, flip_axes=axes), 5, draw(i)):
            along = torch.tensor([int(made["label"].long().diff(dim=d).flatten()[0]) for d in (1, 2, 3)])
            flipped |= along == -steps
    assert flipped.nonzero().flatten().tolist() == axes


@pytest.mark.parametrize("name", ["BTCV", "BraTS", "LA-SEG", "TDSC-ABUS", "MSD-Hippocampus"])
def test_every_shipped_recipe_makes_its_crops(name: str) -> None:
    made = training_crops(case(), load_recipe(name), 5, draw(0))
    assert len(made) == 4 and all(c["image"].dtype == torch.float32 and c["label"].dtype == torch.int16 for c in made)


# ---------------------------------------------------------------------- views of a classification


def test_the_middle_is_cut_or_padded_around() -> None:
    image = torch.arange(2 * 7 * 4 * 5.0).reshape(2, 7, 4, 5)
    view = central_cube(image, 5)
    assert torch.equal(view[:, :, 1:], image[:, 1:6]) and (view[:, :, 0] == BACKGROUND).all()


@pytest.mark.parametrize("name", ONE_OF)
def test_each_change_of_a_view_is_drawn_from_its_stream_and_changes_it(name: str) -> None:
    recipe = Recipe(task="classification", classes={0: "a", 1: "b"}, train=Training(one_of=[name], one_of_p=1.0))
    g = torch.Generator().manual_seed(0)
    image = F.avg_pool3d(torch.rand(2, 14, 13, 12, generator=g), 3, 1, 1) * 2 - 1
    one, same, other = (training_cube(image, recipe, 8, np.random.default_rng(s)) for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and one.shape == (2, 8, 8, 8)
    plain = training_cube(image, dataclasses.replace(recipe, train=Training()), 8, np.random.default_rng(0))
    assert not torch.allclose(one, plain) and one.isfinite().all()


def test_an_affine_view_turns_about_the_middle_and_brings_in_background() -> None:
    """A centred ball keeps its middle; of many views the volume varies by the product of the scales; none is sheared away."""
    axes = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 21)] * 3, indexing="ij"))
    ball = torch.where(axes.norm(dim=0) < 0.5, 1.0, BACKGROUND)[None]
    recipe = Recipe(task="classification", classes={0: "a", 1: "b"}, train=Training(one_of=["affine"], one_of_p=1.0))
    views = [training_cube(ball, recipe, 21, np.random.default_rng(s)) for s in range(40)]
    volumes = torch.stack([(v > 0).sum() / (ball > 0).sum() for v in views])
    assert 0.75**3 < volumes.min() < 0.8 and 1.4 < volumes.max() < 1.3**3
    middles = torch.stack([(axes * (v[0] > 0)).sum((1, 2, 3)) / (v > 0).sum() for v in views])
    assert 0.1 < middles.abs().max() < 0.44


def test_an_affine_view_scales_each_axis_by_itself_and_keeps_right_angles() -> None:
    """The map is read off an image of its own coordinates, near the middle, where nothing comes from outside."""
    n = 24
    place = (2 * torch.arange(n) + 1) / n - 1
    coordinates = torch.stack(torch.meshgrid(place, place, place, indexing="ij"))  # [3, n, n, n]
    recipe = Recipe(task="classification", classes={0: "a", 1: "b"}, train=Training(one_of=["affine"], one_of_p=1.0))
    middle = (coordinates.abs() < 0.3).all(0)
    out = torch.cat([coordinates[:, middle], torch.ones(1, int(middle.sum()))]).T  # [m, 4]
    ratios = []
    for seed in range(30):
        view = training_cube(coordinates, recipe, n, np.random.default_rng(seed))
        matrix = torch.linalg.lstsq(out, view[:, middle].T).solution.T  # [3, 4]
        torch.testing.assert_close(out @ matrix.T, view[:, middle].T, atol=1e-4, rtol=0)
        products = matrix[:, :3].T @ matrix[:, :3]
        scales = products.diagonal().rsqrt()
        assert (products - products.diagonal().diag()).abs().max() < 1e-3
        assert scales.min() > 0.8 - 1e-3 and scales.max() < 1.25 + 1e-3
        ratios.append(float(scales.max() / scales.min()))
    assert min(ratios) > 1.001 and max(ratios) > 1.3


def test_noise_of_a_view_has_a_standard_deviation_up_to_that_of_pretraining() -> None:
    recipe = Recipe(task="classification", classes={0: "a", 1: "b"}, train=Training(one_of=["noise"], one_of_p=1.0))
    image = torch.linspace(-1, 1, 12**3).reshape(1, 12, 12, 12)
    stds = torch.stack([(training_cube(image, recipe, 12, np.random.default_rng(s)) - image).std() for s in range(200)])
    assert stds.max() < 0.0021 and 0.0009 < stds.mean() < 0.0011
