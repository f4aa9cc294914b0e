"""Pictures and pages: arrays in, files out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.visual.cases import draw_case, draw_patches, pca_colours
from dinov2.visual.figures import STYLE, draw_bars
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


def test_patches_and_bars_are_drawn_without_a_trace_in_the_style_of_others(tmp_path: Path) -> None:
    import matplotlib

    before = {key: matplotlib.rcParams[key] for key in STYLE}
    volume = np.zeros((8, 8, 8), np.float32)
    draw_patches(volume, {"trained": np.ones((2, 2, 2, 3), np.float32)}, 4, tmp_path / "patches.png")
    draw_bars({1: {"trained": [0.2, 0.4], "another": [0.1]}}, "agreement", tmp_path / "bars.png")
    assert {p.name for p in tmp_path.iterdir()} == {"patches.png", "bars.png"}
    assert {key: matplotlib.rcParams[key] for key in STYLE} == before


def test_a_page_escapes_what_it_is_given_and_counts_what_it_leaves_out() -> None:
    rows = [(f"<b>{i}</b>", str(i)) for i in range(MAX_ROWS + 5)]
    text = page("Report", [("3", "volumes")], [("Table", table(("name", "count"), rows))])
    assert "&lt;b&gt;0&lt;/b&gt;" in text and "<b>0</b>" not in text and "and 5 more" in text
    assert histogram("none", [], "") == "" and "median 2 mm" in histogram("sizes", [1, 2, 3], " mm")
    assert picture(np.eye(3), "a plane").startswith('<figure><img alt="" src="data:image/png;base64,')
