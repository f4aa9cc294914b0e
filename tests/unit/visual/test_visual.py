"""Pictures and pages: arrays in, files out."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dinov2.visual import cases
from dinov2.visual.cases import draw_case
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


def test_bars_have_the_style_and_leave_others_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {key: matplotlib.rcParams[key] for key in STYLE}
    drawn: list[Figure] = []
    monkeypatch.setattr(training, "save", lambda figure, path: drawn.append(figure))
    draw_bars({1: {"trained": [0.2, 0.4], "another": [0.1]}}, "agreement", tmp_path / "bars.png")
    (axis,) = drawn[0].axes
    assert not axis.spines["top"].get_visible() and axis.get_ylabel() == "agreement"
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([0.3, 0.1])
    assert {key: matplotlib.rcParams[key] for key in STYLE} == before


def test_a_course_has_a_panel_for_each_metric_and_a_line_at_the_untrained_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(training, "save", lambda figure, path: drawn.append(figure))
    rows = [{"iteration": i, "dino_cross_entropy": 4.0, "ibot_cross_entropy": 5.0, "feature_rank": 9.0 + i} for i in range(3)]
    measured = [{"iteration": i, "knn-a/auc": 0.5 + i, "retrieval-b/median_mm": 20.0 - i} for i in (-1, 2)]
    del measured[1]["knn-a/auc"]  # could not be measured
    training.draw_course(rows, measured, {"knn-a/auc": True, "retrieval-b/median_mm": False}, (128, 512), tmp_path / "a.png")
    panels = {axis.get_title(): axis for axis in drawn[0].axes if axis.axison}
    assert list(panels)[3:] == ["knn-a\nauc, higher is better", "retrieval-b\nmedian_mm, lower is better"]
    points, untrained = panels["retrieval-b\nmedian_mm, lower is better"].lines
    assert points.get_xydata().tolist() == [[0, 21.0], [3, 18.0]] and set(untrained.get_ydata()) == {21.0}
    assert panels["knn-a\nauc, higher is better"].lines[0].get_xydata().tolist() == [[0, -0.5]]


def test_a_page_escapes_what_it_is_given_and_counts_what_it_leaves_out() -> None:
    rows = [(f"<b>{i}</b>", str(i)) for i in range(MAX_ROWS + 5)]
    text = page("Report", [("3", "volumes")], [("Table", table(("name", "count"), rows))])
    assert "&lt;b&gt;0&lt;/b&gt;" in text and "<b>0</b>" not in text and "and 5 more" in text
    assert histogram("none", [], "") == "" and "median 2 mm" in histogram("sizes", [1, 2, 3], " mm")
    assert picture(np.eye(3), "a plane").startswith('<figure><img alt="" src="data:image/png;base64,')
