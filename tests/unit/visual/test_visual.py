"""Pictures and pages: arrays in, files out."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dinov2.visual import cases
from dinov2.visual.cases import draw_case, draw_patches, pca_colours
from dinov2.visual.figures import STYLE, draw_bars, training
from dinov2.visual.page import MAX_ROWS, histogram, page, picture, table


def colours_in(path: Path) -> set[tuple[int, ...]]:
    return {tuple(c) for c in np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).tolist()}


def test_outlines_are_drawn_where_something_is_labelled_and_only_those_are_named(tmp_path: Path) -> None:
    channels = np.linspace(-1, 1, 2 * 12 * 10 * 8, dtype=np.float32).reshape(2, 12, 10, 8)
    liver = np.zeros((12, 10, 8), bool)
    liver[8:11, 2:6, 5:7] = True  # not in the middle planes
    draw_case(channels, {"liver": liver, "absent": np.zeros_like(liver)}, (1.0, 1.0, 3.0), tmp_path / "a.png")
    draw_case(channels, {"absent": np.zeros_like(liver)}, (1.0, 1.0, 3.0), tmp_path / "b.png")
    tab_blue = (31, 119, 180)
    assert tab_blue in colours_in(tmp_path / "a.png") and tab_blue not in colours_in(tmp_path / "b.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]  # nothing half-written beside them


def test_a_case_is_drawn_through_a_given_voxel_under_its_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(cases, "save", lambda figure, *_: drawn.append(figure))
    channels = np.zeros((1, 6, 5, 4), np.float32)
    channels[0, 1, 4, 3] = 1
    draw_case(channels, {}, (1.0, 1.0, 3.0), tmp_path / "a.png", "case $1: Dice 0.5", (1, 4, 3))
    assert [axis.images[0].get_array().max() for axis in drawn[0].axes[:3]] == [1, 1, 1]
    assert drawn[0].get_suptitle() == "case $1: Dice 0.5"
    draw_case(channels, {}, (1.0, 1.0, 3.0), tmp_path / "a.png")
    assert [axis.images[0].get_array().max() for axis in drawn[1].axes[:3]] == [0, 0, 0]


def test_principal_components_are_of_the_masked_cells_alone() -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((5, 4, 3), bool)
    mask[1:4, 1:3] = True
    features = np.full((5, 4, 3, 6), 1e6)  # what is outside would be all that the components see
    features[mask] = rng.normal(size=(mask.sum(), 6)) * [5, 3, 2, 1e-3, 1e-3, 1e-3]
    colours = pca_colours(features, mask)
    assert not colours[~mask].any() and colours.min() == 0 and colours.max() == 1
    strongest = np.corrcoef(colours[mask][:, 0], features[mask][:, 0])[0, 1]
    assert abs(strongest) > 0.95


def test_bars_have_the_style_and_leave_others_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {key: matplotlib.rcParams[key] for key in STYLE}
    drawn: list[Figure] = []
    monkeypatch.setattr(training, "save", lambda figure, path: drawn.append(figure))
    draw_bars({1: {"trained": [0.2, 0.4], "another": [0.1]}}, "agreement", tmp_path / "bars.png")
    (axis,) = drawn[0].axes
    assert not axis.spines["top"].get_visible() and axis.get_ylabel() == "agreement"
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([0.3, 0.1])
    assert {key: matplotlib.rcParams[key] for key in STYLE} == before


def test_patches_are_drawn_under_their_volume(tmp_path: Path) -> None:
    red = np.zeros((2, 2, 2, 3), np.float32)
    red[..., 0] = 1
    draw_patches(np.full((8, 8, 8), -1, np.float32), {"trained": red}, 4, tmp_path / "patches.png")
    assert (255, 0, 0) in colours_in(tmp_path / "patches.png") and [p.name for p in tmp_path.iterdir()] == ["patches.png"]


def test_a_page_escapes_what_it_is_given_and_counts_what_it_leaves_out() -> None:
    rows = [(f"<b>{i}</b>", str(i)) for i in range(MAX_ROWS + 5)]
    text = page("Report", [("3", "volumes")], [("Table", table(("name", "count"), rows))])
    assert "&lt;b&gt;0&lt;/b&gt;" in text and "<b>0</b>" not in text and "and 5 more" in text
    assert histogram("none", [], "") == "" and "median 2 mm" in histogram("sizes", [1, 2, 3], " mm")
    assert picture(np.eye(3), "a plane").startswith('<figure><img alt="" src="data:image/png;base64,')
