"""Looks, and the figures of counts and of a formula."""

from __future__ import annotations

import csv
import io
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from dinov2.cli import main
from dinov2.visual.figure_page import Chapter, Picture, figure_page
from dinov2.visual.figures import planes
from dinov2.visual.figures.planes import TRUTH, Shown, draw_planes
from dinov2.visual.figures.style import looks


def test_looks_differ_without_colours() -> None:
    some = list(looks([str(i) for i in range(7)]).values())
    for kind in ("colour", "marker", "hatch"):
        assert len({getattr(one, kind) for one in some}) == 7
    assert len({str(one.dash) for one in some}) == 7
    from dinov2.visual.figures.style import grey

    assert all(abs(grey(a.colour) - grey(b.colour)) > 0.1 for a, b in pairwise(some))  # side by side in a grey print
    assert len({(o.colour, o.marker, o.hatch) for o in looks([str(i) for i in range(80)]).values()}) == 80


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_corpus_is_counted_by_organ_and_modality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = [("brain", "MR")] * 5 + [("brain", "CT")] * 2 + [("lung <&>", "CT")] * 3
    entries = [
        {"image": f"{i}.nii", "spacing": [1, 1, 1], "shape": [9, 9, 9], "organ": o, "modality": m}
        for i, (o, m) in enumerate(kinds)
    ]
    (tmp_path / "list.json").write_text(json.dumps([*entries, {**entries[0], "image": "m.nii", "label_map": True}]))
    assert main(["figure", "corpus", str(tmp_path / "list.json"), "--output", str(tmp_path / "out")]) == 0
    assert "11 volumes" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"corpus.png", "corpus.pdf", "corpus.csv"}
    found = {(r["organ"], r["modality"]): int(r["volumes"]) for r in rows(tmp_path / "out" / "corpus.csv")}
    assert found == {("brain", "MR"): 5, ("brain", "CT"): 2, ("brain", "label maps"): 1, ("lung <&>", "CT"): 3}


def test_octants_are_those_of_the_network(tmp_path: Path) -> None:
    assert main(["figure", "octants", "--points", "2", "--output", str(tmp_path)]) == 0
    table = [r for r in rows(tmp_path / "octants.csv") if r["panel"] == "3D"]
    places = np.array([[float(r[f"axis_{i}"]) for i in (1, 2, 3)] for r in table]).reshape(8, 2, 3)
    assert (np.abs(places) == np.array([1, 2])[None, :, None]).all()
    assert len({tuple(np.sign(p)) for p in places[:, 0]}) == 8 and (np.sign(places[:, 0]) == np.sign(places[:, 1])).all()
    assert len([r for r in rows(tmp_path / "octants.csv") if r["panel"] == "2D"]) == 16


def test_pictures_of_a_page_stand_in_proportion_to_their_size_in_print() -> None:
    def drawn(inches: float, dpi: int) -> bytes:
        written = io.BytesIO()
        Figure(figsize=(inches, 1)).savefig(written, format="png", dpi=dpi)
        return written.getvalue()

    pictures = [Picture(drawn(3, 300), "a"), Picture(drawn(6, 100), "b"), Picture(b"without a size", "c")]
    page = figure_page("t", [], [Chapter("one", pictures)])
    found = re.findall(r'<img alt="(\w)"[^>]*?(?: style="width:([\d.]+)in")?>', page)
    assert found == [
        ("a", "4.20"),
        ("b", "8.40"),
        ("c", ""),
    ]


def test_words_beside_many_predictions_do_not_lie_on_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [
        "3DINO",
        "MONAI-ViT",
        "SwinRandom",
        "3DINO-linear",
        "MONAI-ViT-linear",
        "Random-linear",
        "Untrained",
        "UNet",
        "a" * 20,
    ]
    inside = np.zeros((34, 40, 8), bool)
    inside[10:20, 10:20] = True
    masks = {column: {"anterior": inside} for column in (TRUTH, *methods)}
    rows = [
        Shown(f"hippocampus_{i:03d} (middle)\n3.45 %", np.zeros(inside.shape), (1, 1, 1), masks, dict.fromkeys(methods, 0.5))
        for i in range(4)
    ]
    drawn: list[Figure] = []
    monkeypatch.setattr(planes, "publish", lambda figure, *_: drawn.append(figure))
    draw_planes(rows, methods, ["anterior"], tmp_path / "panels")
    drawn[0].draw_without_rendering()
    first = drawn[0].axes[: len(methods) + 2]
    boxes = [axis.title.get_window_extent() for axis in first]
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
    boxes = [axis.yaxis.label.get_window_extent() for axis in drawn[0].axes[:: len(first)]]
    assert len(boxes) == 4 and all(a.y0 > b.y1 for a, b in pairwise(boxes))
