"""`dinov2 probe`: what is there is found, what is not is near chance, people stay together, and tables join or are refused."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import get_scorer, roc_auc_score

from dinov2.cli import main
from dinov2.data import write_datalist
from dinov2.eval.crossval import command
from dinov2.eval.crossval.baselines import covariate_columns
from dinov2.eval.crossval.command import ProbeRequest, open_question
from dinov2.eval.crossval.models import (
    OutOfFold,
    Target,
    as_linear_map,
    cross_validate,
    inner_splits,
    linear_model,
    log_likelihood,
    predict,
    splits_of,
)
from dinov2.eval.crossval.scores import auc, mean_roc, score, summarise
from dinov2.eval.metrics.statistics import bootstrap_interval, drawn_counts, percentile_interval
from dinov2.eval.probing.saved_probe import open_probe
from dinov2.models.vision_transformer import vit_tiny_3d

N = 36
QUICK = ["--no-scans", "--folds", "3", "--repeats", "1"]
SEX = np.tile(["f", "m", "f"], N // 3)
VIEW = {"mode": "full_image", "size": None, "overlap": 0.5}


def write_features(path: Path, features: np.ndarray, order: Sequence[int] | None = None, **about: object) -> Path:
    """A table as `dinov2 embed` writes it; a scan's `cls` is its row, `pooled` a constant."""
    rows = list(range(len(features)) if order is None else order)
    columns = {
        "id": pa.array([f"scan{i:02}" for i in rows]),
        "path": pa.array([f"images/sub-{i:02}_T1w.nii.gz" for i in rows]),
        "channel": pa.array([None] * len(rows), pa.int32()),
        "patient": pa.array([f"p{i}" for i in rows]),
        "sha": pa.array([f"sha{i}" for i in rows]),
        "cls": pa.array([features[i] for i in rows], pa.list_(pa.float32(), features.shape[1])),
        "pooled": pa.array([np.zeros(features.shape[1])] * len(rows), pa.list_(pa.float32(), features.shape[1])),
    }
    meta = {"key": {"network (weights or dtype)": "abc", **VIEW}, **about}
    pq.write_table(pa.table(columns).replace_schema_metadata({"dinov2-3d": json.dumps(meta)}), path)
    return path


def informative(seed: int = 0) -> np.ndarray:
    """[N, 6], the first two of which tell sex and age; the others are noise."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(N, 6))
    features[:, 0] += 3 * (SEX == "m")
    features[:, 1] += (age() - 40) / 4
    return features


def age() -> np.ndarray:
    return np.random.default_rng(5).uniform(20, 60, N).round(1)


def people_rows() -> list[dict[str, str]]:
    return [
        {"participant_id": f"sub-{i:02}", "age": str(a), "sex": str(s), "site": "AB"[i % 2], "family": f"fam{i // 2}"}
        for i, (a, s) in enumerate(zip(age(), SEX, strict=True))
    ]


def write_people(path: Path, rows: Sequence[dict[str, str]], delimiter: str = ",", start: str = "") -> Path:
    with path.open("w", newline="") as file:
        file.write(start)
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def feats(tmp_path: Path) -> Path:
    return write_features(tmp_path / "feats.parquet", informative())


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a small probe's time."""
    monkeypatch.setattr(command, "draw", lambda *args: [])


@pytest.fixture
def people(tmp_path: Path) -> Path:
    return write_people(tmp_path / "participants.tsv", people_rows(), "\t")


def run(feats: Path, people: Path, target: str, output: Path, *words: str) -> dict:
    assert main(["probe", str(feats), "--table", str(people), "--target", target, "--output", str(output), *QUICK, *words]) == 0
    return json.loads((output / "results.json").read_text())


def refusal(capfd: pytest.CaptureFixture[str], feats: Path, people: Path, target: str, *words: str) -> str:
    """The one line of a refusal."""
    output = feats.parent / "refused"
    code = main(["probe", str(feats), "--table", str(people), "--target", target, "--output", str(output), *QUICK, *words])
    said = capfd.readouterr().err
    assert code == 2 and said.count("\n") == 1 and not (output / "results.json").exists(), said
    return said


def test_what_features_know_is_found_and_all_files_are_there(
    feats: Path, people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside covariates, an untrained network and the majority; intervals of differences are paired."""
    untrained = write_features(tmp_path / "u.parquet", np.random.default_rng(1).normal(size=(N, 6)), untrained=0)
    words = ("--covariates", "site,age", "--untrained", str(untrained))
    found = run(feats, people, "sex", tmp_path / "out", *words)
    names = ["features", "untrained network (1 seed)", "site, age", "features, site, age", "majority"]
    assert list(found["scores"]) == names and found["classes"] == {"f": 24, "m": 12}
    assert found["scores"]["features"]["auc"]["value"] > 0.9 and found["scores"]["majority"]["auc"]["value"] == 0.5
    assert found["differences"]["majority"]["auc"]["reading"] == "better"
    assert found["differences"]["features, site, age"]["auc"]["reading"] == "not told apart"
    said = capsys.readouterr().out
    assert f"{N} of {N} scans joined, {N} of {N} lines; its column participant_id is the scans' BIDS subject" in said
    assert "the features are better than" in said and "balanced accuracy" in said
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"results.json", "predictions.csv", "roc.png", "roc.pdf", "probe.pth", "decisive.json"} <= files
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    by_hand = roc_auc_score([r["sex"] == "m" for r in rows], [float(r["features: p(m)"]) for r in rows])
    assert by_hand == pytest.approx(found["scores"]["features"]["auc"]["value"], abs=0.05)  # pooled over folds, not within


def test_a_number_is_told_too_and_the_figure_is_a_scatter(feats: Path, people: Path, tmp_path: Path) -> None:
    found = run(feats, people, "age", tmp_path / "out")
    assert found["task"] == "regression" and found["scores"]["features"]["r2"]["value"] > 0.6
    assert found["differences"]["median"]["mae"]["reading"] == "better" and (tmp_path / "out" / "scatter.pdf").exists()
    assert found["differences"]["median"]["mae"]["ci95"][1] < 0, "a smaller error is better"


def test_noise_is_near_chance_and_its_interval_holds_a_half() -> None:
    """On average over tables too: nothing of a test fold is seen before."""
    values = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        target = Target("sex", rng.permutation((SEX == "m").astype(int)), ["f", "m"], np.arange(N))
        folds = [splits_of(target, np.arange(N), 3, 0)]
        found = cross_validate(linear_model, [rng.normal(size=(N, 60))], target, folds, lambda: None)
        one = summarise({"features": found}, "features", target)["scores"]["features"]["auc"]
        values.append(one["value"])
        assert one["ci95"][0] < 0.5 < one["ci95"][1] or seed > 0
    assert abs(np.mean(values) - 0.5) < 0.12


@pytest.mark.parametrize("classes", [["f", "m"], []])
def test_people_are_never_on_both_sides_of_a_fold(classes: list[str]) -> None:
    """Of the outer folds, and of the inner ones that choose the penalty; every row is tested once."""
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 20, 60)
    values = (groups % 2) if classes else rng.normal(size=60)
    target = Target("t", values, classes, groups)
    outer = splits_of(target, np.arange(60), 5, 0)
    assert sorted(np.concatenate([tested for _, tested in outer])) == list(range(60))
    for fitted, tested in outer:
        assert not set(groups[fitted]) & set(groups[tested])
        for inner_fitted, inner_tested in inner_splits(target, fitted, 0):
            assert not set(groups[fitted[inner_fitted]]) & set(groups[fitted[inner_tested]])


def test_the_log_likelihood_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    x = 30 * rng.normal(size=(40, 3))  # so that some probabilities are 0 and 1 to rounding
    values = np.where(x[:, 0] > 0, 4, np.where(x[:, 1] > 0, 2, 1))
    for taken in (values != 2, values > 0):
        model = LogisticRegression(C=100).fit(x[taken], values[taken])
        asked = x[taken], values[taken][::-1]  # surely wrong ones among them
        assert log_likelihood(model, *asked) == pytest.approx(get_scorer("neg_log_loss")(model, *asked), rel=1e-12)


def test_the_penalty_is_chosen_without_the_test_fold() -> None:
    """What the test fold holds changes no other answer: neither its features nor its labels are seen."""
    target = Target("sex", (SEX == "m").astype(int), ["f", "m"], np.arange(N))
    fitted, tested = splits_of(target, np.arange(N), 3, 0)[0]
    x = informative()
    before = cross_validate(linear_model, [x], target, [[(fitted, tested)]], lambda: None).predicted[0, tested[1:]]
    values = target.values.copy()
    values[tested[0]] = 1 - values[tested[0]]
    x[tested[0]] *= 100
    other = Target("sex", values, ["f", "m"], np.arange(N))
    after = cross_validate(linear_model, [x], other, [[(fitted, tested)]], lambda: None).predicted[0, tested[1:]]
    np.testing.assert_array_equal(before, after)


@pytest.mark.usefixtures("no_figures")
def test_the_order_of_rows_and_lines_changes_nothing(feats: Path, people: Path, tmp_path: Path) -> None:
    order = np.random.default_rng(3).permutation(N)
    (tmp_path / "other").mkdir()
    other = write_features(tmp_path / "other" / "feats.parquet", informative(), order.tolist())
    lines = [people_rows()[i] for i in order[::-1]]
    shuffled = write_people(tmp_path / "other" / "participants.tsv", lines, "\t")
    one, two = run(feats, people, "sex", tmp_path / "a"), run(other, shuffled, "sex", tmp_path / "b")
    assert one == two
    assert (tmp_path / "a" / "predictions.csv").read_bytes() == (tmp_path / "b" / "predictions.csv").read_bytes()


@pytest.mark.usefixtures("no_figures")
def test_a_finished_folder_is_said_and_another_probes_is_refused(
    feats: Path, people: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = run(feats, people, "sex", tmp_path / "refused")
    written = (tmp_path / "refused" / "results.json").stat().st_mtime_ns
    assert run(feats, people, "sex", tmp_path / "refused") == found
    assert (tmp_path / "refused" / "results.json").stat().st_mtime_ns == written
    assert "holds this probe already, finished" in capfd.readouterr().out
    words = ["--table", str(people), "--target", "age", "--output", str(tmp_path / "refused"), *QUICK, "--seed", "1"]
    assert main(["probe", str(feats), *words]) == 2
    assert "holds a run with another seed, target: use another --output" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------ joining


@pytest.mark.parametrize(
    ("name", "column", "delimiter", "start", "way"),
    [
        ("images/sub-{:02}_T1w.nii.gz", "image", ";", "\ufeff", "path"),
        ("images\\sub-{:02}_T1w.nii.gz", "bild", ",", "", "path"),
        ("scan{:02}", "id", "\t", "", "id"),
        ("/elsewhere/sub-{:02}_T1w.nii.gz", "file", ",", "", "file name"),
        ("sub-{:02}_T1w", "name, of it", ",", "", "file name without ending"),
        ("p{}", "who", ",", "\ufeff", "patient"),
        ("{:02}", "participant_id", "\t", "", "BIDS subject (sub-...)"),
    ],
)
def test_tables_join_by_whatever_names_the_scans(
    feats: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    column: str,
    delimiter: str,
    start: str,
    way: str,
) -> None:
    """With a byte order mark, semicolons (and decimal commas), quoted names, and rows of each side without the other."""
    decimal = "," if delimiter == ";" else "."
    rows = [
        {column: name.format(i), 'what "it" is': str(s), "age": str(a).replace(".", decimal)}
        for i, (a, s) in enumerate(zip(age(), SEX, strict=True))
    ]
    table = write_people(tmp_path / "people.csv", [*rows[2:], {**rows[0], column: "nobody"}], delimiter, start)
    asked = ProbeRequest(feats, table, 'what "it" is', tmp_path / "out", covariates=("age",), folds=3)
    lines: list[str] = []
    question = open_question(asked, lines.append)
    said = "\n".join(lines)
    assert f"{N - 2} of {N} scans joined, {N - 2} of {N - 1} lines; its column {column} is the scans' {way}\n" in said
    assert "scans without a line: 2, such as scan00" in said and f"lines without a scan: 1, such as line {N}, nobody" in said
    assert [int(name[4:]) for name in question.ids] == list(range(2, N))
    np.testing.assert_array_equal(question.target.values, (SEX[2:] == "m").astype(int))
    covariates = covariate_columns(question.people, question.lines, "age")
    np.testing.assert_array_equal(covariates[:, 0], age()[2:])


def test_scans_of_a_person_are_kept_together_and_said(tmp_path: Path, people: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two scans of each: of one line, and of the same voxels under two names."""
    path = write_features(tmp_path / "feats.parquet", informative())
    table = pq.read_table(path)
    twice = table.set_column(0, "id", pa.array([f"again{i:02}" for i in range(N)]))
    both = pa.concat_tables([table, twice])
    pq.write_table(both.replace_schema_metadata(table.schema.metadata), path)
    lines: list[str] = []
    asked = ProbeRequest(path, people, "sex", tmp_path / "out", folds=3)
    groups = open_question(asked, lines.append).target.groups
    assert f"warning: {N} people seem to have several scans" in "\n".join(lines)
    assert len(groups) == 2 * N and set(np.bincount(groups)) == {2}
    lines.clear()
    groups = open_question(dataclasses.replace(asked, group="family"), lines.append).target.groups
    assert set(np.bincount(groups)) == {4} and "several scans" not in "\n".join(lines)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("target", "words", "message"),
    [
        ("sexx", [], "--target sexx: {people} has no such column (did you mean 'sex'?): it has participant_id, age, sex"),
        ("sex", ["--group", "sex"], "--group sex: is the target"),
        ("sex", ["--covariates", "age,sex"], "--covariates sex: is the target"),
        ("sex", ["--covariates", "ages"], "--covariates ages: {people} has no such column (did you mean 'age'?)"),
        ("sex", ["--folds", "13"], "m is the class of 12 people, fewer than 13 folds"),
        ("age", ["--folds", "40"], "36 people are fewer than 40 folds"),
        ("sex", ["--task", "regression"], "sex is 'f', no number"),
        ("sex", ["--folds", "2"], "--folds 2 --repeats 1: give three folds or more"),
        ("sex", ["--features", "patches"], "--features patches: choose one of cls, pooled, cls+pooled"),
        ("sex", ["--key", "site"], "none of its 36 lines joins"),
        ("family", [], "fam0 is the class of 2 people, fewer than 3 folds"),
        ("sex", ["--covariates", "volume"], "--covariates volume: cannot be measured: --no-scans"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(
    feats: Path, people: Path, capfd: pytest.CaptureFixture[str], target: str, words: list[str], message: str
) -> None:
    assert message.format(people=people) in refusal(capfd, feats, people, target, *words)


@pytest.mark.parametrize(
    ("change", "target", "message"),
    [
        ({3: {"age": "nan"}}, "age", "line 5: age is nan, no value"),
        ({3: {"sex": ""}}, "sex", "line 5: sex is empty"),
        ({i: {"sex": "f"} for i in range(N)}, "sex", "everybody is f: there is nothing to tell"),
        ({i: {"age": "31.5"} for i in range(N)}, "age", "every value is 31.5"),
        ({4: {"participant_id": "sub-03"}}, "sex", "line 6: names the same scans as line 5 (sub-03)"),
        ({i: {"participant_id": f"x{i}"} for i in range(N)}, "sex", "none of its 36 lines joins"),
    ],
)
def test_tables_that_cannot_be_used_are_refused_in_one_line(
    feats: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], change: dict[int, dict[str, str]], target: str, message: str
) -> None:
    table = write_people(tmp_path / "people.csv", [{**row, **change.get(i, {})} for i, row in enumerate(people_rows())])
    assert message in refusal(capfd, feats, table, target)


def test_tables_of_features_that_cannot_be_used_are_refused_in_one_line(
    feats: Path, people: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    features = informative()
    features[4, 2] = np.nan
    bad = write_features(tmp_path / "bad.parquet", features)
    assert f"cls of 1 of {N} rows is not finite, such as scan04" in refusal(capfd, bad, people, "sex")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    assert "a Parquet file of another kind" in refusal(capfd, tmp_path / "other.parquet", people, "sex")
    assert "no Parquet file: give the table" in refusal(capfd, people, people, "sex")
    assert "No such file" in refusal(capfd, tmp_path / "nowhere.parquet", people, "sex")
    assert "is not of an untrained network" in refusal(capfd, feats, people, "sex", "--untrained", str(feats))
    fewer = write_features(tmp_path / "fewer.parquet", informative(), range(5), untrained=0)
    assert "has no scan scan05" in refusal(capfd, feats, people, "sex", "--untrained", str(fewer))


# ------------------------------------------------------------------------------------------------ scores


def test_an_auc_compares_within_folds_and_its_curve_has_its_area() -> None:
    rng = np.random.default_rng(0)
    values = np.tile([0, 1, 1], 20)
    target = Target("t", values, ["a", "b"], np.arange(60))
    scores = rng.normal(size=60).round(1) + values * 0.5  # with ties
    fold = np.repeat([0, 1, 2], 20)
    found = OutOfFold(np.stack([-scores, scores], -1)[None], fold[None])
    parts = [roc_auc_score(values[fold == f], scores[fold == f]) for f in range(3)]
    pairs = [int((values[fold == f] == 0).sum() * (values[fold == f] == 1).sum()) for f in range(3)]
    everyone = np.ones((1, 60))
    assert auc(found, target, everyone)[0] == pytest.approx(np.average(parts, weights=pairs))
    shifted = OutOfFold(found.predicted + fold[None, :, None], fold[None])  # a fold's own level says nothing
    assert auc(shifted, target, everyone)[0] == pytest.approx(auc(found, target, everyone)[0])
    grid = np.linspace(0, 1, 4001)
    assert np.trapezoid(mean_roc(found, target, 1, grid), grid) == pytest.approx(auc(found, target, everyone)[0], abs=2e-3)


def test_draws_at_once_are_the_draws_of_the_bootstrap() -> None:
    """A mean by counts is the mean of the rows drawn; people come with all of their rows."""
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=30), [f"p{i % 9}" for i in range(30)]
    target = Target("t", np.zeros(30), [], np.array([int(g[1:]) for g in groups]))
    found = OutOfFold(values[None, :, None], np.zeros((1, 30), int))
    (expected,) = bootstrap_interval(lambda rows: [np.abs(values[rows]).mean()], groups)
    np.testing.assert_allclose(percentile_interval(score("mae", found, target, drawn_counts(groups))), expected)


# ------------------------------------------------------------------------------------------------ classify


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scans, weights, their table and that of the untrained network, people."""
    folder = tmp_path_factory.mktemp("embedded")
    torch.manual_seed(0)
    torch.save(vit_tiny_3d(patch_size=8, img_size=16, init_values=0.5).state_dict(), folder / "t.pth")
    items, rows = [], []
    for i in range(16):
        rng = np.random.default_rng(i)
        voxels = rng.integers(1, 900, (16, 12, 10 + 2 * (i % 3))).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0])), folder / f"{i:02}.nii")
        items.append({"image": str(folder / f"{i:02}.nii"), "shape": list(voxels.shape), "spacing": [2, 2, 3]})
        rows.append({"image": f"{i:02}.nii", "kind": ("one", "two", "three")[i % 3], "number": f"{i * 1.5 + rng.normal():.3f}"})
    write_datalist(folder / "list.json", items)
    write_people(folder / "people.csv", rows)
    words = ["embed", str(folder / "list.json"), "--weights", str(folder / "t.pth"), "--workers", "0"]
    assert main([*words, "--output", str(folder / "feats.parquet")]) == 0
    assert main([*words, "--output", str(folder / "untrained.parquet"), "--untrained", "1"]) == 0
    return folder


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("target", ["kind", "number"])
def test_classify_says_what_the_probe_says(
    embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    """Of the same scan; the probe is the linear model that was fitted on all rows. Volume is read from the scans."""
    words = ["--table", str(embedded / "people.csv"), "--target", target, "--output", str(tmp_path / "out")]
    others = ["--untrained", str(embedded / "untrained.parquet")] if target == "kind" else ["--no-scans"]
    assert main(["probe", str(embedded / "feats.parquet"), *words, *others, "--folds", "3", "--repeats", "1"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    compared = {"volume", "volume and histogram", "untrained network (1 seed)"}
    assert compared & set(results["scores"]) == (compared if target == "kind" else set())
    capsys.readouterr()
    scan = embedded / "05.nii"
    assert main(["classify", "--probe", str(tmp_path / "out" / "probe.pth"), "--input", str(scan)]) == 0
    said = capsys.readouterr().out

    table = pq.read_table(embedded / "feats.parquet")
    x = np.concatenate([np.array(table[part].to_pylist(), float) for part in ("cls", "pooled")], axis=1)
    people = list(csv.DictReader((embedded / "people.csv").open()))
    classes = ["one", "three", "two"] if target == "kind" else []
    values = np.array([classes.index(p["kind"]) if classes else float(p["number"]) for p in people])
    asked = Target(target, values, classes, np.arange(16))
    model = linear_model(asked, inner_splits(asked, np.arange(16), 0)).fit(x, values)
    expected = predict(model, x[[5]], asked)[0]
    np.testing.assert_allclose(open_probe(tmp_path / "out" / "probe.pth")([scan]).numpy(), expected, atol=1e-5)
    shown = ", ".join(f"{name} {p:.3f}" for name, p in zip(classes, expected, strict=False))
    assert (shown in said) if classes else (f"{scan}: number {expected[0]:.4g}" in said)


@pytest.mark.usefixtures("no_figures")
def test_a_probe_of_other_weights_is_refused(embedded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--table", str(embedded / "people.csv"), "--target", "kind", "--output", str(tmp_path / "out"), *QUICK]
    assert main(["probe", str(embedded / "feats.parquet"), *words]) == 0
    torch.manual_seed(1)
    torch.save(vit_tiny_3d(patch_size=8, img_size=16, init_values=0.5).state_dict(), tmp_path / "other.pth")
    words = ["--probe", str(tmp_path / "out" / "probe.pth"), "--input", str(embedded / "05.nii")]
    assert main(["classify", *words, "--pretrained-weights", str(tmp_path / "other.pth")]) == 2
    assert "not the weights that" in capfd.readouterr().err


def test_two_classes_have_logits_of_which_one_is_zero() -> None:
    target = Target("sex", (SEX == "m").astype(int), ["f", "m"], np.arange(N))
    x = informative()
    model = linear_model(target, inner_splits(target, np.arange(N), 0)).fit(x, target.values)
    weight, bias = as_linear_map(model, x.shape[1])
    probabilities = torch.from_numpy(x @ weight.T + bias).softmax(-1).numpy()
    np.testing.assert_allclose(probabilities, predict(model, x, target), atol=1e-9)
