"""The quick start and the doctor, small: what they write and what they say."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from dinov2.cli import main
from dinov2.demo import readout, run
from dinov2.demo.generate import SPACING_MM, Case, generate, spline
from dinov2.demo.run import summary
from dinov2.eval.measures.dense_readout import raw_features

SHORT = ["optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=4", "train.log_period=1", "train.batch_size_per_gpu=4"]


@pytest.fixture
def tiny_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NUM_TRAIN": 2, "NUM_TEST": 1, "LABELLED": (1, 2), "SHIFT": 4, "UNTRAINED_SEEDS": (7,)}.items():
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(readout, "CROPS_PER_VOLUME", 10)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_demo")
def test_the_quick_start_writes_pictures_numbers_and_weights_and_can_be_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nilearn")
    out = tmp_path / "out"
    assert main(["demo", "--output", str(out), *SHORT]) == 0
    said = capsys.readouterr().out
    for name in ("features.png", "curves.png", "pca.png", "readout.png", "results.json", "list.json"):
        assert (out / name).stat().st_size > 100, name
    assert "dinov2 train --config-file pretrain/demo" in said
    assert "labelled volumes" in said and "untrained" in said and "raw patch" in said and str(out / "pca.png") in said
    assert (out / "run" / "eval" / "training_3" / "teacher_checkpoint.pth").exists()
    assert main(["demo", "--output", str(out), *SHORT]) == 0
    table = [line for line in said.splitlines() if "labelled" in line]
    assert [line for line in capsys.readouterr().out.splitlines() if "labelled" in line] == table  # the same numbers


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_demo")
def test_the_quick_start_runs_on_a_folder_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundled = Path(__file__).parents[1] / "data"
    data = tmp_path / "data"
    data.mkdir()
    for path in bundled.glob("*.nii.gz"):
        (data / path.name).write_bytes(path.read_bytes())
    (data / "broken.nii.gz").write_text("no image")
    assert main(["demo", "--output", str(tmp_path / "out"), "--data", str(data), *SHORT]) == 0
    caught = capsys.readouterr()
    assert (tmp_path / "out" / "features.png").exists()
    assert "1 volumes of" in caught.out and "broken.nii.gz: cannot be opened" in caught.err
    assert (tmp_path / "out" / "pca.png").exists() and not (tmp_path / "out" / "readout.png").exists()


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
    labels = [np.asarray(nib.load(c.label).dataobj) for c in two]
    assert set(np.unique(labels[0])) == {0, 1, 2, 3}
    assert all(z in (SPACING_MM, 2 * SPACING_MM) for z in nib.load(two[0].image).header.get_zooms())
    crops = readout.labelled_crops(first[0], patch_size=4, seed=0)
    assert crops.windows.shape[1:] == (1, 16, 16, 16) and crops.shares.shape[1:] == (4, 4, 4, 4)
    torch.testing.assert_close(crops.shares.sum(-1), torch.ones(crops.shares.shape[:-1]))
    outside = crops.shares[..., 0] == 1  # where the labels say outside, the image is background
    patches = raw_features(crops.windows, 4)[..., :64]
    assert (patches[outside] <= -0.99).float().mean() > 0.97


def test_a_spline_is_what_scipys_zoom_makes() -> None:
    coarse = np.random.default_rng(0).normal(0, 4.0, (6, 7, 3))
    expected = ndimage.zoom(coarse, (20 / 6, 23 / 7, 19 / 3), order=3)
    np.testing.assert_allclose(spline(coarse, (20, 23, 19)), expected, rtol=0, atol=1e-12)


def test_the_read_out_finds_what_is_linear_and_nothing_in_noise() -> None:
    generator = torch.Generator().manual_seed(0)

    def volume(informative: bool) -> tuple[torch.Tensor, torch.Tensor]:
        classes = torch.randint(4, (readout.CROPS_PER_VOLUME, 2, 2, 2), generator=generator)
        shares = torch.nn.functional.one_hot(classes, 4).float()
        noise = torch.randn(*classes.shape, 6, generator=generator)
        return (
            torch.cat([shares @ torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), noise], -1)
            if informative
            else noise
        ), shares

    good = readout.read_out([volume(True)], [volume(True), volume(True)])
    bad = readout.read_out([volume(False)], [volume(False)])
    assert len(good) == 2 and min(good) > 0.95 and max(bad) < 0.4


def test_the_summary_says_plainly_when_training_did_not_help() -> None:
    lines = summary({1: {"demo encoder": [0.6], "trained": [0.3, 0.4], "untrained": [0.5], "raw patch": [0.2]}})
    assert "the demo encoder beats untrained by +0.100, beats raw patch by +0.400" in lines[-2]
    assert "does NOT beat untrained by -0.150" in lines[-1] and "beats raw patch by +0.150" in lines[-1]


def test_the_doctor_reports_what_is_there_and_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--report", str(tmp_path / "r.txt")]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "r.txt").read_text() == said
    for word in (torch.__version__, "device:", "cores", "xformers", "compiled operators", "deformable attention: CPU "):
        assert word in said
    assert main(["doctor", "--report", str(tmp_path / "no" / "r.txt")]) == 2
    assert "choose another file" in capsys.readouterr().err
