"""The quick start and the doctor, small: what they write and what they say."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from dinov2.cli import main
from dinov2.data.corpus.overlap import warn_of_overlap
from dinov2.data.datalist import Entry
from dinov2.demo import killed, readout, run
from dinov2.demo.generate import QUARTERS, SPACING_MM, Case, deform, generate, load_template, spline
from dinov2.demo.killed import same_weights, train_and_kill
from dinov2.demo.practice import LABELS, write_practice
from dinov2.demo.same_place import SCANS, ask, by_tokens, by_voxels, errors_mm
from dinov2.errors import BadInput
from dinov2.features.encoder import load_encoder
from dinov2.features.scans import load_scan
from tests.conftest import BUNDLED

SHORT = ["optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=6", "train.log_period=1", "train.batch_size_per_gpu=4"]
SHORT += ["train.checkpoint_period=2", "evaluation.eval_period_iterations=4"]


@pytest.fixture
def tiny_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A part of each head, few made ones, few places."""
    for path in SCANS:
        whole = nib.load(path)
        nib.save(whole.slicer[24:60, 30:70, 24:56], tmp_path / path.name)
    monkeypatch.setattr(run, "SCANS", tuple(tmp_path / path.name for path in SCANS))
    for name, value in {"LABELLED": (1, 2), "NUM_VALIDATION": 1, "NUM_TEST": 1, "CROPS": 2}.items():
        monkeypatch.setattr(readout, name, value)
    monkeypatch.setattr(run, "NUM_MADE", 4)
    monkeypatch.setattr(run, "NUM_PLACES", 4)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_demo")
def test_the_quick_start_shows_what_it_says_and_can_be_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nilearn")
    out = tmp_path / "out"
    assert main(["demo", "--output", str(out), *SHORT]) == 0
    said = capsys.readouterr().out
    for name in ("places.png", "readout.png", "run/report.html", "list.json", "features/viewer.html"):
        assert (out / name).stat().st_size > 100, name
    assert all((out / "features" / f"sub-{number}_T1w_2mm" / "pca.png").exists() for number in ("06", "13"))
    assert "dinov2 train --config-file pretrain/demo" in said and "dinov2 index FOLDER" in said
    assert "weights of iteration 3 after the kill: the same, bit for bit" in said
    results = json.loads((out / "results.json").read_text())
    for name in ("demo encoder", "untrained", "voxels", "before the training", "after it"):
        errors = results["same_place_mm"][name]
        assert len(errors) == 8, name
        assert f"{name:>22}{np.median(errors):>15.1f}" in said, name
    assert set(results["quarters_dice"]["2"]) == {"demo encoder", "untrained", "voxels around", "voxels"}
    assert results["killed_run_is_the_same"] is True
    monkeypatch.setattr(run, "same_weights", lambda *_: False)
    assert main(["demo", "--output", str(out), *SHORT]) == 1, "to its end, and no success"
    numbers = [line for line in said.splitlines() if "labelled" in line or line.endswith("%")]
    again = capsys.readouterr().out.splitlines()
    assert len(numbers) > 4 and [line for line in again if "labelled" in line or line.endswith("%")] == numbers


@pytest.mark.slow
def test_the_quick_start_runs_on_a_folder_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in BUNDLED.glob("*.nii.gz"):
        (data / path.name).write_bytes(path.read_bytes())
    (data / "broken.nii.gz").write_text("no image")
    assert main(["demo", "--output", str(tmp_path / "out"), "--data", str(data), *SHORT]) == 0
    caught = capsys.readouterr()
    assert "1 volumes of" in caught.out and "broken.nii.gz: cannot be opened" in caught.err
    written = {"features/pca.png", "features/viewer.html", "run/report.html"}
    assert all((tmp_path / "out" / name).exists() for name in written) and not (tmp_path / "out" / "readout.png").exists()


def test_a_place_of_a_head_is_found_in_itself_and_the_error_is_in_mm() -> None:
    encoder = load_encoder("demo", device="cpu")
    scan = encoder.load(SCANS[:1])
    asked = ask(scan, scan, np.random.default_rng(0), 3)
    np.testing.assert_allclose(asked.wanted_mm, asked.places_mm, atol=1e-9)
    assert errors_mm(asked, by_voxels(asked)).max() < 1e-9, "the crop itself is among those that are searched"
    assert errors_mm(asked, by_tokens(encoder, [scan])(asked)).max() < 8, "within a patch of 8 mm"
    np.testing.assert_allclose(errors_mm(asked, asked.wanted_mm + np.array([3.0, 0.0, 4.0])), 5.0)


def test_the_heads_that_come_along_were_not_in_the_encoders_training() -> None:
    seen = BUNDLED / "sub-01_T1w_2mm.nii.gz"
    shared = warn_of_overlap([Entry(str(path), ()) for path in (*SCANS, seen)], "demo")
    assert shared is not None and [entry.image for entry in shared.scans] == [str(seen)]


def test_a_training_that_ends_by_itself_before_the_teacher_is_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(killed, "_train_until", lambda *_: False)
    (tmp_path / "run.log").write_text("begun\nno room on the disk\n")
    with pytest.raises(BadInput, match=r"its training ended early: no room on the disk \(.*run.log\)"):
        train_and_kill([], tmp_path / "run", 3, tmp_path / "teacher.pth")


def test_weights_that_differ_in_a_bit_are_not_the_same(tmp_path: Path) -> None:
    weights = {"a": torch.ones(3), "b": torch.zeros(2)}
    for name, changed in (("one", {}), ("same", {}), ("other", {"b": torch.tensor([0.0, 1e-30])})):
        torch.save({"teacher": {**weights, **changed}}, tmp_path / name)
    assert same_weights(tmp_path / "one", tmp_path / "same") and not same_weights(tmp_path / "one", tmp_path / "other")


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", str(tmp_path / "out"), "--data", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["demo", "--output", str(tmp_path / "out"), "--data", str(tmp_path)]) == 2
    assert "no NIfTI, Analyze, MGH, NRRD, MetaImage, NumPy or DICOM file in it" in capsys.readouterr().err
    (tmp_path / "one.nii.gz").write_bytes(next((Path(__file__).parents[1] / "data").glob("*.nii.gz")).read_bytes())
    assert main(["demo", "--output", str(tmp_path / "out"), "--data", str(tmp_path)]) == 2
    assert "at least 2 are needed" in capsys.readouterr().err


@pytest.mark.slow
def test_generated_volumes_follow_their_seed_and_do_not_share_a_place(tmp_path: Path) -> None:
    pytest.importorskip("nilearn")
    first, again, two = (list(generate(tmp_path / n, k, 1, 0)) for n, k in (("a", 1), ("b", 1), ("c", 2)))

    def voxels(case: Case) -> np.ndarray:
        return np.asarray(nib.load(case.image).dataobj)

    np.testing.assert_array_equal(voxels(first[0]), voxels(again[0]))
    np.testing.assert_array_equal(voxels(first[0]), voxels(two[0]))
    assert all(z in (SPACING_MM, 2 * SPACING_MM) for z in nib.load(two[0].image).header.get_zooms())
    labels = [np.asarray(nib.load(c.label).dataobj) for c in two]
    assert all(
        set(np.unique(label)) == {0, *QUARTERS} and label.shape == voxels(c).shape for label, c in zip(labels, two, strict=True)
    )
    assert (voxels(two[0])[labels[0] == 0] == 0).mean() > 0.97, "outside there is nothing"
    scan = load_scan([two[0].image])
    middle = {q: np.argwhere(labels[0] == q).mean(0) for q in QUARTERS}
    assert middle[2][1] > middle[1][1] + 15 and middle[4][1] > middle[3][1] + 15, "front has the larger y"
    assert middle[3][2] > middle[1][2] + 15 and middle[4][2] > middle[2][2] + 15, "upper the larger z"
    assert scan.voxels.ndim == 4


def test_practice_heads_have_sizes_and_quarters_and_no_folder_is_written_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "practice"
    write_practice(folder, num_people=6, spacing_mm=6.0)
    rows = [line.split(",") for line in (folder / "people.csv").read_text().splitlines()[1:]]
    voxels = {size: [] for _, size in rows}
    for name, size in rows:
        voxels[size].append((nib.load(folder / name).get_fdata() > 0).sum())
    assert min(voxels["large"]) > max(voxels["small"])
    data_set = folder / "nnUNet_raw" / "Dataset001_Quarters"
    assert len(list((data_set / "imagesTr").iterdir())) == len(list((data_set / "labelsTr").iterdir())) == 4
    labels = nib.load(data_set / "labelsTr" / "person00.nii.gz").get_fdata()
    assert [*np.unique(labels)] == [*LABELS.values()]
    where = {name: np.argwhere(labels == value).mean(0) for name, value in LABELS.items()}
    assert where["upper front"][1] > where["upper back"][1] and where["upper front"][2] > where["lower front"][2]
    assert main(["demo", "--practice", str(folder)]) == 2 and "choose a new folder" in capsys.readouterr().err


def test_slices_of_twice_the_thickness_take_even_grids() -> None:
    pytest.importorskip("nilearn")
    tissue, t1, quarters = deform(load_template(), np.random.default_rng(0), 4.0)
    assert tissue.shape[1:] == t1.shape == quarters.shape and not any(n % 2 for n in t1.shape)


def test_a_spline_is_what_scipys_zoom_makes() -> None:
    coarse = np.random.default_rng(0).normal(0, 4.0, (6, 7, 3))
    expected = ndimage.zoom(coarse, (20 / 6, 23 / 7, 19 / 3), order=3)
    np.testing.assert_allclose(spline(coarse, (20, 23, 19)), expected, rtol=0, atol=1e-12)


def test_the_summary_says_plainly_where_the_encoder_is_behind() -> None:
    lines = readout.summary({1: {"demo encoder": [0.6, 0.4], "untrained": [0.55], "voxels": [0.2]}})
    assert "0.500" in lines[1] and "0.550" in lines[1]
    assert lines[-1] == "with 1 labelled: the demo encoder does NOT beat untrained by -0.050, beats voxels by +0.300"


def test_the_doctor_reports_what_is_there_and_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--report", str(tmp_path / "r.txt")]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "r.txt").read_text() == said
    for word in (torch.__version__, "device:", "cores", "xformers", "compiled operators", "deformable attention: CPU "):
        assert word in said
    assert main(["doctor", "--report", str(tmp_path / "no" / "r.txt")]) == 2
    assert "choose another file" in capsys.readouterr().err
