"""Panels of predictions: which cases, which plane, what proportions, whose Dice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure

from dinov2.data.downstream.cases import Case
from dinov2.eval.study.cells import Cell, cells_of, labelled_sets
from dinov2.eval.study.figures import Drawn
from dinov2.eval.study.predicted import BEST, Masks, draw_predictions, masks_of
from dinov2.eval.study.schema import Study
from dinov2.files import TEMPORARY
from dinov2.visual.figure_page import Chapter
from dinov2.visual.figures.planes import ALPHA, CLASS_COLOURS, Shown, draw_planes
from tests.unit.eval.study.generated import make_tables
from tests.unit.eval.study.test_figures import read, texts


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Figures by name, laid out; their pictures and PDFs are empty files."""
    found: dict[str, Figure] = {}

    def touch(figure: Figure, path: Path, **form: object) -> None:
        found[path.name.removeprefix(TEMPORARY).rpartition(".")[0]] = figure
        path.touch()

    monkeypatch.setattr(Figure, "savefig", touch)
    return found


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Of four test cases, whose cells have kept a network but for one method's."""
    methods, blobs = {"3DINO": {"weights": "random"}, "Random": None}, (["one", "two"], {25: 1, 50: 2, 100: 4})
    study = make_tables(tmp_path, methods, {"blobs": blobs}, {}, cases=4, base_data_dir=str(tmp_path))
    rng = np.random.default_rng(0)
    rows = []
    for i in range(9):
        label = np.zeros((10, 8, 6), np.uint8)
        label[2:5, 2:6, 1:4], label[6:9, 3:5, 3] = 1, 2
        for name, voxels in (("image", rng.normal(size=label.shape).astype(np.float32)), ("label", label)):
            nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 2.0, 3.0, 1.0])), tmp_path / f"{name}{i}.nii.gz")
        rows.append({"image": f"image{i}.nii.gz", "label": f"label{i}.nii.gz", "case": f"case{i}"})
    parts = {"shuffle_seed": 0, "training": rows[5:], "validation": rows[4:5], "test": rows[:4]}
    (tmp_path / "blobs_100_datalist.json").write_text(json.dumps(parts))
    for cell in cells_of(study, labelled_sets(study)):
        cell.folder.mkdir(parents=True)
        if not (cell.method == "Random" and cell.percent == 100):
            (cell.folder / BEST).touch()
    return study


def test_the_subjects_best_middle_and_worst_case_are_drawn_with_the_tables_dice(study: Study, kept: dict[str, Figure]) -> None:
    asked: list[tuple[str, list[str]]] = []

    def predict(cell: Cell, cases: Sequence[Case]) -> list[Masks]:
        asked.append((cell.name, [case.name for case in cases]))
        return [masks_of(case.truth.roll(1, 1), labelled_sets(study)["blobs"]) for case in cases]

    drawn = Drawn(study.output / "figures", list(study.methods), [Chapter("blobs"), Chapter("All data sets")])
    draw_predictions(study, drawn, predict)
    items = [r for r in read(study.output / "items.csv") if r["metric"] == "dice" and r["seed"] == "0"]
    own = {r["case"]: float(r["value"]) for r in items if (r["method"], r["percent"], r["class"]) == ("3DINO", "25", "mean")}
    ordered = sorted(own, key=lambda case: -own[case])
    chosen = [ordered[0], ordered[1], ordered[3]]
    assert sorted(asked) == sorted((f"blobs/{name}/0", chosen) for name in ("3DINO/25", "3DINO/100", "Random/25"))
    rows = read(drawn.folder / "panels_blobs.csv")
    assert list(dict.fromkeys(r["row"] for r in rows)) == [
        f"{case} ({why}) {p} %" for case, why in zip(chosen, ("best", "middle", "worst"), strict=True) for p in (25, 100)
    ]
    for row in rows:
        case, percent = row["row"].split(" (")[0], row["row"].split()[-2]
        wanted = (row["column"], percent, case, "mean")
        (value,) = [r["value"] for r in items if (r["method"], r["percent"], r["case"], r["class"]) == wanted]
        assert float(row["dice"]) == float(value) and row["plane"] == "3"
    words = [t.get_text() for t in texts(kept["panels_blobs"])]
    assert words.count("none") == 3  # the network that was not kept
    aspects = {axis.get_aspect() for axis in kept["panels_blobs"].axes}
    assert aspects == {2.0}  # 1 mm to the right, 2 mm upwards
    for row in read(drawn.folder / "panels_classes_blobs.csv"):
        wanted = (row["column"], "25", chosen[1], row["row"])
        (value,) = [r["value"] for r in items if (r["method"], r["percent"], r["case"], r["class"]) == wanted]
        assert float(row["dice"]) == float(value)
    assert [p.source.stem for p in drawn.chapters[0].pictures] == ["panels_blobs", "panels_classes_blobs"]
    assert all(t.get_fontsize() >= 6 for figure in kept.values() for t in texts(figure))


def test_what_is_inside_another_region_lies_above_it_in_its_own_colour(tmp_path: Path, kept: dict[str, Figure]) -> None:
    image = np.zeros((6, 5, 4), np.float32)
    whole, core = np.zeros((6, 5, 4), bool), np.zeros((6, 5, 4), bool)
    whole[1:5, 1:4, 2], core[2, 2, 2] = True, True
    row = Shown("case", image, (1.0, 1.0, 1.0), {"truth": {"core": core, "whole": whole}, "A": {}}, {"A": float("nan")})
    draw_planes([row], ["A"], ["core", "whole"], tmp_path / "x")
    (truth,) = [a for a in kept["x"].axes if a.get_title().startswith("truth")]
    plane = np.asarray(truth.images[0].get_array())
    from matplotlib.colors import to_rgb

    grey = np.full(3, 0.5)
    of_whole = (1 - ALPHA) * grey + ALPHA * np.array(to_rgb(CLASS_COLOURS[1]))
    assert plane[1, 1] == pytest.approx(of_whole) and plane[0, 0] == pytest.approx(grey)
    assert plane[2, 2] == pytest.approx((1 - ALPHA) * grey + ALPHA * np.array(to_rgb(CLASS_COLOURS[0])))
    assert read(tmp_path / "x.csv") == [{"row": "case", "column": "A", "plane": "2", "dice": ""}]
