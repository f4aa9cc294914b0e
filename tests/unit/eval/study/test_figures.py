"""A study's figures: what is drawn is what the tables have, in print's sizes and forms, with names of any kind."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from dinov2.data.downstream.lists import write_downstream_datalist
from dinov2.eval.study.cells import labelled_sets
from dinov2.eval.study.differences import differences, write_differences
from dinov2.eval.study.figures import DatasetRows, _image, draw_study
from dinov2.eval.study.schema import Study
from dinov2.files import TEMPORARY
from tests.unit.eval.study.generated import make_tables

METHODS = {
    "a_b": {"head": "Linear", "weights": "random"},
    "<x>&$1": {"model": "Random", "head": "Linear"},
    "50%": {"model": "Random"},
}
BRAIN = (["50 %", "<x>", "never_there"], {5: 1, 10: 2, 50: 10, 100: 20})
AGES = (["young", "old_&_wise", "never_there"], {50: 10, 100: 20})


@dataclass(frozen=True)
class Drawing:
    study: Study
    figures: dict[str, Figure]
    said: list[str]

    @property
    def folder(self) -> Path:
        return self.study.output / "figures"

    def rows(self, stem: str) -> list[dict[str, str]]:
        return read(self.folder / f"{stem}.csv")

    def words(self, stem: str) -> str:
        return " ".join(t.get_text() for t in texts(self.figures[stem])).replace("\n", " ")


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def texts(figure: Figure) -> list[Text]:
    return [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_visible() and t.get_text().strip()]


def draw(study: Study, rendered: Collection[str] = ()) -> Drawing:
    """All figures, laid out and kept; some are rendered too, coarse, of others the files are empty. A warning is an error."""
    kept: dict[str, Figure] = {}
    said: list[str] = []
    render = Figure.savefig

    def savefig(figure: Figure, path: Path, **form: Any) -> None:
        stem = path.name.removeprefix(TEMPORARY).rpartition(".")[0]
        kept[stem] = figure
        if stem in rendered:
            render(figure, path, **{**form, "dpi": 40})
        else:
            path.touch()

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(Figure, "savefig", savefig)
        draw_study(study, said.append)
    return Drawing(study, kept, said)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawing:
    folder = tmp_path_factory.mktemp("figures")
    keys = {"paper": "ood", "baseline": "50%", "base_data_dir": str(folder)}
    study = make_tables(folder, METHODS, {"brain": BRAIN}, {"ages": AGES}, (0, 1, 2), 6, ["never_there"], **keys)
    scans = [{"case": f"case{i}", "image": str(folder / f"{i}.nii.gz"), "label": 0} for i in range(9)]
    parts = {"test": scans[:6], "training": scans[6:8], "validation": scans[8:]}
    write_downstream_datalist(folder / "ages_cls_datalist.json", parts, seed=0)
    for i in range(9):
        ramp = np.broadcast_to(np.arange(6.0)[:, None, None], (6, 8, 5))
        nib.save(nib.Nifti1Image(ramp.astype(np.float32), np.diag([1.0, 1.0, 3.0, 1.0])), folder / f"{i}.nii.gz")
    recipes = {name: labelled.recipe for name, labelled in labelled_sets(study).items()}
    write_differences(study, differences(study, recipes))
    return draw(study, RENDERED)


RENDERED = ("bars_brain", "cases_ages")
STEMS = {
    "efficiency_brain", "bars_brain", "classes_brain", "efficiency_ages", "bars_ages", "classes_ages", "confusion_ages",
    "cases_ages", "linear_decoder", "out_of_distribution",
}  # fmt: skip


def test_each_figure_is_there_in_three_forms_beside_its_tables_and_page(drawn: Drawing) -> None:
    tables = {f"table_{name}.tex" for name in ("brain_dice", "brain_hd95_mm", "ages_auc", "ages_f1")}
    wanted = {f"{stem}.{ending}" for stem in STEMS for ending in ("png", "pdf", "csv")} | tables | {"report.html"}
    assert {p.name for p in drawn.folder.iterdir()} == wanted
    assert f"{len(STEMS)} figures" in drawn.said[-1]


def values_of(rows: Iterator[dict[str, str]] | list[dict[str, str]], **wanted: Any) -> list[float]:
    return [float(r["value"]) for r in rows if r["value"] and all(r[k] == str(v) for k, v in wanted.items())]


def of_comparison(compared: list[dict[str, str]], dataset: str, percent: int | str, metric: str, **own: str) -> dict[str, str]:
    """The row of all classes."""
    wanted = {"dataset": dataset, "percent": str(percent), "metric": metric, **own}
    (row,) = [r for r in compared if r["class"] in ("all", "mean of classes") and all(r[k] == v for k, v in wanted.items())]
    return row


def test_curves_are_the_tables_means_and_the_intervals_of_the_comparison(drawn: Drawing) -> None:
    items, runs = read(drawn.study.output / "items.csv"), read(drawn.study.output / "runs.csv")
    compared = read(drawn.study.output / "comparison.csv")
    for name, counts, metrics in (("brain", BRAIN[1], ("dice", "hd95_mm")), ("ages", AGES[1], ("auc", "f1"))):
        rows = drawn.rows(f"efficiency_{name}")
        assert [r["what"] for r in rows[:: len(rows) // 2]] == (["Dice", "HD95 (mm)"] if name == "brain" else ["AUC", "F1"])
        assert len(rows) == 2 * len(METHODS) * len(counts)
        for metric, label in zip(metrics, dict.fromkeys(r["what"] for r in rows), strict=True):
            for method in METHODS:
                for percent, count in counts.items():
                    (row,) = [
                        r for r in rows if (r["what"], r["series"], r["place"]) == (label, method, f"{percent} % ({count})")
                    ]
                    table = items if name == "brain" else runs
                    own = values_of(table, dataset=name, method=method, percent=percent, metric=metric, **{"class": "mean"})
                    assert float(row["mean"]) == pytest.approx(np.mean(own), abs=1e-12)
                    beside = of_comparison(compared, name, percent, metric, run=method, minus="")
                    found = [float(row[k]) for k in ("low", "high")]
                    assert found == pytest.approx([float(beside[f"bootstrap_{k}"]) for k in ("low", "high")], rel=1e-4)
                    assert row["n"] == beside["n"] == ("6" if name == "brain" else "3")


def test_bars_are_of_the_third_largest_and_the_largest_fraction_with_the_comparisons_p(drawn: Drawing) -> None:
    compared = read(drawn.study.output / "comparison.csv")
    for name, label, metric, places in (
        ("brain", "Dice", "dice", ["10 % (2)", "100 % (20)"]), ("ages", "AUC", "auc", ["50 % (10)", "100 % (20)"]),
    ):  # fmt: skip
        rows = [r for r in drawn.rows(f"bars_{name}") if r["what"] == label]
        assert list(dict.fromkeys(r["place"] for r in rows)) == places
        curve = {(r["place"], r["series"]): r["mean"] for r in drawn.rows(f"efficiency_{name}") if r["what"] == label}
        assert {(r["place"], r["series"]): r["mean"] for r in rows if not r["minus"]} == {
            key: mean for key, mean in curve.items() if key[0] in places
        }
        tests = [r for r in rows if r["minus"]]
        assert {(r["place"], r["series"], r["minus"]) for r in tests} == {
            (p, "a_b", m) for p in places for m in ("<x>&$1", "50%")
        }
        for row in tests:
            beside = of_comparison(compared, name, row["place"].split(" %")[0], metric, minus=row["minus"])
            assert [float(row[k]) for k in ("p", "p_holm")] == pytest.approx(
                [float(beside[k]) for k in ("p", "p_holm")], rel=1e-4
            )
    marks = [t.get_text() for t in texts(drawn.figures["bars_ages"])]
    scale = ((1e-4, "****"), (1e-3, "***"), (1e-2, "**"), (0.05, "*"), (2, "ns"))
    stars = [next(s for p, s in scale if float(r["p_holm"]) <= p) for r in drawn.rows("bars_ages") if r["minus"]]
    assert sorted(m for m in marks if m in ("****", "***", "**", "*", "ns")) == sorted(stars) and len(stars) == 8


def test_classes_matrices_and_single_cases_are_those_of_the_items(drawn: Drawing) -> None:
    items, runs = read(drawn.study.output / "items.csv"), read(drawn.study.output / "runs.csv")
    for row in drawn.rows("classes_brain"):
        own = values_of(items, dataset="brain", method=row["series"], percent=10, metric="dice", **{"class": row["place"]})
        assert (row["mean"] == "" and not own) or float(row["mean"]) == pytest.approx(np.mean(own), abs=1e-12)
    for row in drawn.rows("classes_ages"):
        own = values_of(runs, dataset="ages", method=row["series"], percent=50, metric="auc", **{"class": row["place"]})
        assert (row["mean"] == "" and not own) or float(row["mean"]) == pytest.approx(np.mean(own), abs=1e-12)
    assert len(drawn.rows("classes_brain")) == len(drawn.rows("classes_ages")) == 9

    chance: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    truth: dict[tuple[str, ...], str] = {}
    for r in items:
        if r["dataset"] == "ages":
            key = (r["method"], r["percent"], r["seed"], r["case"])
            if r["metric"] == "probability":
                chance[key][r["class"]] = float(r["value"])
            else:
                truth[key] = r["class"]
    for row in drawn.rows("confusion_ages"):
        shares = []
        for seed in "012":
            of_true = [k for k in truth if k[:3] == (row["series"], "50", seed) and truth[k] == row["true"]]
            hits = [k for k in of_true if max(chance[k], key=lambda c: chance[k][c]) == row["predicted"]]
            shares += [len(hits) / len(of_true)] if of_true else []
        assert (row["share"] == "" and row["true"] == "never_there") or float(row["share"]) == pytest.approx(np.mean(shares))
    rows = drawn.rows("cases_ages")
    for row in rows:
        own = [chance[row["series"], row["fraction"].split(" %")[0], seed, row["case"]][row["class"]] for seed in "012"]
        assert (
            float(row["probability"]) == pytest.approx(np.mean(own), abs=1e-12)
            and row["true"] == truth["a_b", "50", "0", row["case"]]
        )
    sure = {c: np.mean([chance["a_b", "100", s, c][truth["a_b", "100", s, c]] for s in "012"]) for c in {k[3] for k in truth}}
    ordered = sorted(sure, key=lambda c: -sure[c])
    assert list(dict.fromkeys(r["case"] for r in rows)) == [ordered[0], ordered[2], ordered[5]]
    shown = [axis.images[0].get_array() for axis in drawn.figures["cases_ages"].axes if axis.images]
    assert [plane.shape for plane in shown] == [(300, 225)] * 3, "the middle slice, 8 mm upwards and 6 across"
    assert all(plane[0].min() == 0 and plane[0].max() == 1 and (np.diff(plane[0]) >= 0).all() for plane in shown)


def test_a_case_whose_scan_is_not_there_has_no_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = DatasetRows("ages", "classification", {}, [], [], {}, ["a"], {"one": str(tmp_path / "gone.nii.gz")})
    assert _image(data, "one") is None and _image(data, "two") is None
    assert "gone.nii.gz" in caplog.text and "the list has no such test case" in caplog.text


def test_linear_decoders_are_held_against_each_other_alone(drawn: Drawing) -> None:
    rows = drawn.rows("linear_decoder")
    assert {(r["series"], r["minus"]) for r in rows} == {("a_b", ""), ("<x>&$1", ""), ("a_b", "<x>&$1")}
    (of_both,) = {r["p_holm"] for r in rows if r["minus"] and r["place"] == "10 % (2)"}
    raw = next(r["p"] for r in rows if r["minus"] and r["place"] == "10 % (2)")
    assert of_both == raw  # one test: nothing to correct for
    assert {r["place"] for r in drawn.rows("out_of_distribution")} == {f"{p} % ({n})" for p, n in BRAIN[1].items()}


def test_print_can_use_them(drawn: Drawing) -> None:
    for stem in STEMS:
        figure = drawn.figures[stem]
        assert figure.get_figwidth() * 25.4 <= 180.01, stem
        small = [(t.get_text(), t.get_fontsize()) for t in texts(figure) if t.get_fontsize() < 6]
        assert not small, f"{stem}: {small}"
    for stem in RENDERED:
        pdf = (drawn.folder / f"{stem}.pdf").read_bytes()
        assert b"FontFile2" in pdf and b"/Type3" not in pdf and b"/CreationDate" not in pdf, stem
    from matplotlib import pyplot

    assert not pyplot.get_fignums()


def test_what_a_figure_cannot_show_stands_on_it(drawn: Drawing) -> None:
    assert "In no test case that counts: never_there" in drawn.words("classes_brain") and "no value" in drawn.words(
        "classes_brain"
    )
    assert "No test case of: never_there" in drawn.words("confusion_ages")
    assert "cannot give p below" not in drawn.words("bars_ages")


def test_names_are_shown_as_they_are_and_the_page_needs_nothing_else(drawn: Drawing) -> None:
    assert {"a_b", "<x>&$1", "50%"} <= {t.get_text() for t in texts(drawn.figures["bars_brain"])}
    page = (drawn.folder / "report.html").read_text()
    assert "&lt;x&gt;&amp;$1" in page and "<x>" not in page
    assert not re.search(r"https?:|src=\"(?!data:)|@import|url\(|<link|<script", page)
    assert page.count("data:image/png;base64,") == len(STEMS)


def test_latex_has_every_sign_escaped(drawn: Drawing, tmp_path: Path) -> None:
    tables = sorted(drawn.folder.glob("*.tex"))
    for path in tables:
        text = path.read_text().partition("\n")[2]
        assert r"a\_b" in text and r"\textless{}x\textgreater{}\&\$1" in text and r"50\%" in text
        bare = re.sub(r"\\[a-zA-Z]+|\\\\|\\[&%$#_{}]", "", text)
        body = bare.replace(" & ", "")
        assert not re.search(r"[%$#_&<>~^]", body), path.name
        depth = [bare[:i].count("{") - bare[:i].count("}") for i in range(len(bare) + 1)]
        assert min(depth) == 0 and depth[-1] == 0
        assert text.count(r"\textbf{") == text.count("% (") - text.count(r"labels (") or r"\textbf{" in text
    if shutil.which("pdflatex"):
        body = "".join(p.read_text() for p in tables)
        (tmp_path / "t.tex").write_text(
            f"\\documentclass{{article}}\\usepackage[T1]{{fontenc}}\\usepackage{{booktabs}}\\begin{{document}}{body}\\end{{document}}"
        )
        subprocess.run(["pdflatex", "-interaction=batchmode", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True)


def test_one_of_everything_says_what_is_missing(tmp_path: Path) -> None:
    study = make_tables(tmp_path, {"UNet": None}, {"s": (["x"], {100: 4})}, {"c": (["p", "q"], {100: 4})}, [0], 1)
    drawing = draw(study)
    for stem in ("efficiency_s", "efficiency_c", "bars_s", "bars_c"):
        words = drawing.words(stem)
        assert "One method: nothing to hold it against." in words
        assert f"One {'test case' if stem.endswith('s') else 'seed'}: no interval, no test." in words
        assert ("One fraction of labels: points, no curve." in words) == stem.startswith("efficiency")
        (row,) = [r for r in drawing.rows(stem) if r["what"] in ("Dice", "AUC")]
        assert float(row["mean"]) and row["low"] == row["high"] == "" and row["n"] == "1"
    assert "linear_decoder" not in drawing.figures
