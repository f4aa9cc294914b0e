"""`dinov2 report`: each kind's page holds the numbers of its files, needs no network, and says what is wrong in a line."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread, imsave

from dinov2.cli import main
from dinov2.configs import default_yaml, load_and_merge_config_3d
from dinov2.data import TrainLoader, read_datalist
from dinov2.errors import BadInput
from dinov2.eval.study.compare import compare_results
from dinov2.eval.study.results import read_results
from dinov2.features.pca import fit_basis, turned_to
from dinov2.report.command import report
from dinov2.report.examples import first_batch
from dinov2.report.pretraining import licence_lines, open_list
from dinov2.report.record import device_hours, read_log
from dinov2.visual.crops import Crop, shown_plane
from dinov2.visual.figures.curves import Curve, CurvePanel, curve_png, running_mean
from tests.conftest import Trainer

IDENTITY = {"dataset_name": "d", "recipe": "Recipe(...)", "config": "a: 1"}


def page_of(folder: Path) -> str:
    """The page's text."""
    out = folder.parent / "page.html"
    report(folder, out, None, False, lambda line: None)
    return checked(out.read_text())


def checked(text: str) -> str:
    """The text of a page on which every picture is a PNG that shows something, and that loads nothing."""
    for source in re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', text):
        assert source.startswith(("data:image/png;base64,", "#c")), source[:60]
    assert not re.search(r"url\(|@import|<script|<link", text)
    for data in re.findall(r"base64,([^\"]*)", text):
        assert np.ptp(imread(io.BytesIO(base64.b64decode(data)))[..., :3]) > 0
    return html.unescape(text)


def write_rows(path: Path, rows: list[dict], end: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def png(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, np.arange(12).reshape(3, 4), cmap="gray")


def test_a_pretraining_is_shown_with_what_it_saw_and_learned(tmp_path: Path) -> None:
    rng, items = np.random.default_rng(0), []
    for name in "ab":
        voxels = rng.normal(size=(26, 22, 16)) + 9 * (np.indices((26, 22, 16)).sum(0) > 30)
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.diag([1.5, 1.5, 3.0, 1.0])), tmp_path / f"{name}.nii.gz")
        items.append({"image": f"{name}.nii.gz", "shape": [26, 22, 16], "dataset": "made", "licence": "CC0"})
    write_json(tmp_path / "list.json", items)
    trainer, out = Trainer(tmp_path / "list.json"), tmp_path / "run"
    short = ["train.OFFICIAL_EPOCH_LENGTH=2", "evaluation.eval_period_iterations=2"]
    assert trainer.call(out, *short).returncode == 0
    write_rows(out / "evaluation_metrics.json", [{"iteration": 1, "sex/auc": 0.61}, {"iteration": 3, "sex/auc": 0.6789}])
    write_rows(out / "warnings.json", [{"iteration": 2, "name": "collapse", "value": 1, "message": "<b>rank</b> fell"}])
    assert main(["report", str(out)]) == 0
    raw = (out / "report.html").read_text()
    assert "&lt;b&gt;rank&lt;/b&gt; fell" in raw and "<b>rank" not in raw
    text = checked(raw)
    rows = [json.loads(line) for line in (out / "training_metrics.json").read_text().splitlines()]
    for name in ("total_loss", "teacher_entropy", "grad_norm_backbone", "volumes_per_s"):
        assert f"{rows[-1][name]:.4g}" in text, name
    assert "sex: auc" in text and "0.6789" in text
    assert "dino.head_n_prototypes" in text and "student.qkv_bias" not in text.partition("The whole config.yaml")[0]
    run = json.loads((out / "run.json").read_text())
    assert run["versions"]["torch"] in text and "single" in text and "2 volumes, 2 of them large enough" in text
    assert "CC0: made (2)" in text
    assert "by 2 of 2 kept teachers" in text and "iterations of 4" in text and "12</b>" in raw  # volumes seen
    features, crops = (text.partition(f"{title}</h2>")[2].partition("<h2")[0] for title in ("one volume", "and masks"))
    assert features.count("<img") == 1 and crops.count("<img") == 3

    with pytest.raises(BadInput, match=r"--scan .*none.nii.gz: "):
        report(out, None, tmp_path / "none.nii.gz", True, print)

    cfg = load_and_merge_config_3d(str(out / "config.yaml"))
    datalist = read_datalist(trainer.datalist)
    whole = next(iter(TrainLoader(cfg, datalist)))[0]
    batch, count = first_batch(cfg, datalist, 3)
    assert count == 3 and (batch["collated_global_crops"] == whole["collated_global_crops"]).all()
    wide = load_and_merge_config_3d(str(out / "config.yaml"), ["train.batch_size_per_gpu=8"])
    whole = next(iter(TrainLoader(wide, datalist)))[0]
    batch, count = first_batch(wide, datalist, 8)  # two of the eight, with the masks that the eight had
    assert count == 2 and (batch["collated_masks"] == whole["collated_masks"][[0, 1, 8, 9]]).all()
    assert (batch["collated_local_crops"][[0, 2]] == whole["collated_local_crops"][[0, 8]]).all()


def test_what_a_kill_and_numbers_that_are_none_leave_is_said_on_the_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(default_yaml(load_and_merge_config_3d(None, ["train.dataset_path=gone.json"])))
    rows = [
        {"iteration": i, "iter_time": 2.0, "total_loss": None if i == 20 else 7.0 - i / 100, "koleo_loss": None, "wd": 0.04}
        for i in (0, 20, 40)
    ]
    write_rows(run / "training_metrics.json", [*rows[:2], rows[2] | {"odd": math.nan}], '{"iteration": 60, "tot')
    (run / "log.txt").write_text(
        "10:00:00 I x: iterations 0 to 99, 4 volumes\n10:00:00 I x: stopped after iteration 7 on SIGTERM; start\n"
        "10:00:00 I x: iterations 0 to 99, 4 volumes\n10:00:00 W x: iteration 20: loss or gradient is not finite, step "
        "skipped; its volumes: a.nii.gz\n10:00:00 I x: stopped after iteration 29 on SIGINT; start\n"
        "10:00:00 I x: iterations 30 to 99, 4 volumes\n"
    )
    text = page_of(run)
    assert "not finite in 1 of 3 logged iterations, first in 20" in text
    assert "1 of 3 values of total are not finite: gaps" in text
    assert "odd: none of 1 values can be drawn" in text and "1 of 3 values of KoLeo" not in text
    assert "terms of the loss: none of 3 values" in text and "weight decay 0.04" in text
    assert "was cut, by a kill" in text and "went on at iteration 30: asked to stop after iteration 29 (SIGINT)" in text
    assert "Resumed once" in text and "a.nii.gz" in text and "datalist cannot be read from here" in text
    assert read_log(run).starts == [0, 30]


def test_hours_are_of_every_rank_and_of_each_process_at_its_own_speed() -> None:
    row = {"effective_batch": 8, "current_batch_size": 4}
    rows = [row | {"iteration": 0, "iter_time": 100.0}, row | {"iteration": 10, "iter_time": 1.0}]
    rows.append(row | {"iteration": 20, "iter_time": 5.0})
    assert device_hours(rows, [0]) * 3600 == pytest.approx(2 * (100 + 10 * 1 + 10 * 5))
    assert device_hours(rows, [0, 18]) * 3600 == pytest.approx(2 * (100 + 10 * 1 + 7 * 1 + 3 * 5))
    assert device_hours([{"iteration": 3, "iter_time": None}], []) == 0


def test_nothing_is_drawn_from_a_list_that_is_another_by_now(tmp_path: Path) -> None:
    write_json(tmp_path / "list.json", [{"image": "a.nii.gz", "shape": [99, 99, 99], "license": "CC0"}])
    cfg = load_and_merge_config_3d(None, [f"train.dataset_path={tmp_path / 'list.json'}"])
    datalist, lines = open_list(cfg, {})
    assert datalist is not None and "1 volumes, 1 of them large enough" in lines[0]
    assert licence_lines(datalist) == ["Licence of the data, as the list says: CC0: no data set named (1)."]
    assert open_list(cfg, {"datalist_sha256": datalist.sha256})[0] is not None
    datalist, lines = open_list(cfg, {"datalist_sha256": "before"})
    assert datalist is None and "is another list now" in lines[0]


def segmentation(folder: Path) -> None:
    write_json(folder / "decisive.json", IDENTITY | {"segmentation_head": "Linear"})
    dice = {"a/x": (0.9, 0.5), "b": (0.7, 0.2), "c": (0.8, 0.6)}
    lines = [
        f"{case},{name},{value},3,0.5,2,1.5" for case, both in dice.items() for name, value in zip("lr", both, strict=True)
    ]
    background = [f"{case},background,0.99,1,1,2,0" for case in dice]
    (folder / "per_case.csv").write_text(
        "case,class,dice,hd95_mm,nsd,nsd_tolerance_mm,volume_error_ml\n" + "\n".join([*background, *lines]) + "\n"
    )
    mean = {"dice": 0.616, "hd95_mm": 3.0, "nsd": 0.5, "volume_error_ml": None}
    test = {"mean": mean, "mean_with_background": mean, "per_class": {"background": mean, "l": mean, "r": mean}, "num_cases": 3}
    history = {"iters_list": [4, 9], "train_loss_list": [1.5, 1.25], "val_dice_list": [0.3, 0.4321]}
    per_class = {"val_per_cls_dice_list": [[0.9, 0.1, None], [0.9, 0.2, 0.3]]}
    write_json(folder / "results.json", {**history, **per_class, "test": test, "seconds_per_volume": 0.25})
    for name in ("validation_case.png", "worst/1_b_truth.png", "worst/1_b_prediction.png"):
        png(folder / name)


def test_a_segmentation_has_its_table_with_intervals_and_its_pictures(tmp_path: Path) -> None:
    run = tmp_path / "seg"
    segmentation(run)
    write_rows(run / "training_metrics.json", [{"iteration": i, "loss": 2.0 - i, "lr": i * 1e-3} for i in range(3)])
    text = page_of(run)
    (row,) = (r for r in compare_results([read_results(run, "run")]) if (r.metric, r.name) == ("dice", "r"))
    low, high = row.estimate.bootstrap
    assert f"0.616 ({low:.3g} to {high:.3g})" in text and "none" in text and "0.4321" in text
    assert text.index("b, mean Dice 0.450: truth.") < text.index("b, mean Dice 0.450: prediction.")
    assert text.count("<img") == 3 + 2 + 3 and "1 of 2 values of r are not finite" in text
    (run / "results.json").unlink()
    (run / "log.txt").write_text("1 I x: iteration 9: loss 1.2345, validation Dice nan (best 0.1)\n")
    text = page_of(run)
    assert "Not finished" in text and "1.234" in text and "none of 1 values can be drawn" in text


def test_classifications_and_regressions_have_their_scores(tmp_path: Path) -> None:
    write_json(tmp_path / "lin/decisive.json", IDENTITY)
    scores = {"test_auc": 0.71234, "test_auc_ci95": [0.5, 0.875], "test_f1": 0.5, "test_f1_ci95": None, "n_test": 11}
    validation = [{"iteration": 9, "auc": 0.6, "loss": 1.0}, {"iteration": 19, "auc": 0.654, "loss": None}]
    seen = {"classes": ["f", "<m>"], "confusion_matrix": [[4, 1], [2, 4]], "test_auc_per_class": [0.7, 0.7]}
    write_json(tmp_path / "lin/results.json", {**scores, **seen, "validation": validation, "best_head": "one"})
    text = page_of(tmp_path / "lin")
    assert (
        "0.7123" in text and "0.5 to 0.875" in text and "0.654" in text and "&lt;m&gt;" in (tmp_path / "page.html").read_text()
    )

    write_json(tmp_path / "ridge/decisive.json", IDENTITY)
    settings = [{"setting": f"('last 1', {p})", "score": -p} for p in (9.0, 3.25)] + [{"setting": "x", "score": None}]
    results = {"test_mae": 6.25, "test_mae_ci95": [3, 10], "chosen": {"penalty": 3.25}, "validation": settings}
    write_json(tmp_path / "ridge/results.json", results)
    text = page_of(tmp_path / "ridge")
    assert "Regression ridge" in text and "3 to 10" in text and text.index("-3.25") < text.index("-9<")

    write_json(tmp_path / "seeds/decisive.json", IDENTITY)
    several = {"test_auc": 0.75, "test_auc_std": 0.01, "by_seed": {"test_auc": [0.74, 0.76]}, "seeds": [3, 4]}
    write_json(tmp_path / "seeds/results.json", several)
    write_json(tmp_path / "seeds/seed_3/results.json", scores)
    assert "standard deviation of seeds" in page_of(tmp_path / "seeds")


def probe(folder: Path) -> None:
    write_json(folder / "decisive.json", {"program": "probe", "target": "sex"})
    score = {"auc": {"value": 0.743, "ci95": [0.6, 0.869]}, "balanced_accuracy": {"value": 0.65, "ci95": None}}
    difference = {"auc": {"value": -0.2, "ci95": [-0.4, -0.1], "reading": "worse"}}
    difference["balanced_accuracy"] = {"value": 0.0, "ci95": None, "reading": "not told apart"}
    results = {"target": "sex", "people": 53, "scans": 53, "classes": {"f": 39, "m": 14}, "intervals": "95 %, of people"}
    write_json(folder / "results.json", {**results, "scores": {"features": score}, "differences": {"volume": difference}})
    png(folder / "roc.png")


def test_a_probe_has_its_scores_differences_and_figure(tmp_path: Path) -> None:
    probe(tmp_path / "sex")
    text = page_of(tmp_path / "sex")
    assert "0.743 (0.6 to 0.869)" in text and "-0.2 (-0.4 to -0.1): worse" in text and "f 39, m 14" in text
    assert text.count("<img") == 1


def test_a_study_has_the_page_that_its_report_drew(tmp_path: Path) -> None:
    study = tmp_path / "study"
    (study / "figures").mkdir(parents=True)
    (study / "runs.csv").write_text("study\n")
    with pytest.raises(BadInput, match="not drawn yet.*dinov2 study report"):
        page_of(study)
    (study / "figures/report.html").write_text("<p>drawn</p>")
    assert page_of(study) == "<p>drawn</p>"
    os.utime(study / "runs.csv", (2e9, 2e9))
    with pytest.raises(BadInput, match=r"older than runs.csv"):
        page_of(study)


def damaged(name: str, content: str, make: Callable[[Path], None] = segmentation) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        make(folder)
        (folder / name).write_text(content)

    return write


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: f.write_text("x"), "is a file"),
        (lambda f: None, "no such folder"),
        (lambda f: f.mkdir(), "no run's output folder"),
        (lambda f: write_json(f / "one/run.json", {}), "but one in it may be"),
        (lambda f: write_json(f / "run.json", {}), "nothing has been logged yet"),
        (lambda f: (f.mkdir(), (f / "training_metrics.json").write_text('{"iter')), "nothing has been logged yet"),
        (lambda f: (f.mkdir(), (f / "training_metrics.json").write_text("nonsense\n")), "line 1: is damaged"),
        (lambda f: write_json(f / "decisive.json", IDENTITY), "has no numbers yet"),
        (lambda f: write_json(f / "decisive.json", {"program": "probe"}), "the probe is not finished"),
        (lambda f: (f / "cells").mkdir(parents=True), "a study without tables"),
        (damaged("results.json", "[1]"), "holds a list"),
        (damaged("results.json", '{"test": {"mean": 3}}'), "is not as its program writes it"),
        (damaged("results.json", '{"scores": {"features": 1}}', probe), "is not as its program writes it"),
        (damaged("decisive.json", "{"), "is not valid JSON"),
    ],
)
def test_what_is_no_run_or_damaged_is_one_line(
    make: Callable[[Path], object], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line and " E dinov2" in line and not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_and_a_scan_without_checkpoints_are_refused(tmp_path: Path) -> None:
    probe(tmp_path / "sex")
    with pytest.raises(BadInput, match="--output"):
        report(tmp_path / "sex", tmp_path / "none/page.html", None, True, print)
    with pytest.raises(BadInput, match="--scan"):
        report(tmp_path / "sex", None, tmp_path / "a.nii.gz", True, print)


def test_a_panel_has_no_picture_of_nothing_and_the_same_bytes_for_the_same_numbers() -> None:
    steps, values = np.arange(300.0), np.sin(np.arange(300.0))
    values[7] = np.inf
    panel = CurvePanel("a $ b", {"x": Curve(steps, values)}, {"level": 0.5}, [20.0])
    drawn = curve_png(panel)
    assert drawn and drawn == curve_png(panel)
    assert curve_png(CurvePanel("t", {"x": Curve(steps, np.full(300, np.nan))})) is None
    assert curve_png(CurvePanel("t", {"x": Curve(steps, -np.ones(300))}, is_log=True)) is None
    assert curve_png(CurvePanel("t", {"x": Curve(steps, np.where(values > 0, 5.0, -1))}, is_log=True)) is not None
    assert running_mean(np.array([0.0, 3, 6, 9]), 1).tolist() == [1.5, 3, 6, 7.5]


def test_hidden_patches_are_covered_where_they_are() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[1, 3, 2] = True  # the middle plane of 8 voxels is in the third patch
    plane = np.rot90(shown_plane(Crop("", np.zeros((8, 8, 8)), mask)), -1)
    covered = plane[..., 0] != plane[..., 2]
    assert covered[2:4, 6:8].all() and covered.sum() == 4


def test_colours_of_a_turned_network_match_those_of_the_other() -> None:
    rng = np.random.default_rng(0)
    scale = np.array([9, 4, 3.9, 3.8, 0.1, 0.1])
    tokens = rng.normal(size=(6, 5, 4, 6)) * scale
    tokens[..., 0] = np.where(rng.random((6, 5, 4)) > 0.5, 9, -9) + rng.normal(size=(6, 5, 4))
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    other = tokens @ turn  # the same to a network with other axes
    bright = [tokens[..., 0]]
    basis, aim = fit_basis([other], bright), fit_basis([tokens], bright)
    swapped = type(basis)(**{**vars(basis), "axes": basis.axes[:, [0, 3, 1, 2]] * [1, -1, 1, 1]})
    found = turned_to(swapped, other, aim, tokens)
    np.testing.assert_allclose(found.scores(other), aim.scores(tokens), atol=1e-3)
    np.testing.assert_allclose(found.low, aim.low, atol=1e-3)
    np.testing.assert_allclose(found.axes.T @ found.axes, np.eye(4), atol=1e-9)
    np.testing.assert_allclose(found.explained.sum(), aim.explained.sum())
