"""One table of file formats, which readers, index, split, predict, doctor and docs/datasets.md agree on."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dinov2 import doctor
from dinov2.cli import main
from dinov2.data.corpus.index.walk import walk
from dinov2.data.downstream.cases import prepare_case, restore_prediction
from dinov2.data.downstream.lists import Item
from dinov2.data.downstream.recipes import load_recipe
from dinov2.data.downstream.split import find_pairs
from dinov2.data.volumes.formats import (
    DICOM,
    FORMATS,
    NIFTI,
    NUMPY,
    PAIR,
    format_by_name,
    format_of,
    scans_in,
    source_files,
    stem,
)
from dinov2.data.volumes.opening import open_image
from dinov2.errors import BadInput, BadVolume
from dinov2.eval.segmentation_3d.predict import plan_jobs
from tests.conftest import ROOT
from tests.unit.data.corpus.test_index import save_dicom, save_itk, save_nifti, scan

SUFFIXES = [s for f in FORMATS for s in f.suffixes]


def save_pair(path: Path, upper: bool = False) -> tuple[Path, Path]:
    """Header and voxels; nibabel cannot write upper-case endings of pairs."""
    save_nifti(path.with_suffix(".hdr"), scan())
    halves = path.with_suffix(".hdr"), path.with_suffix(".img")
    return tuple(half.rename(half.with_suffix(half.suffix.upper())) for half in halves) if upper else halves


def test_the_documents_table_is_the_codes() -> None:
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+?) \| ((?:`\.[a-z0-9.]+`(?:, )?)+) \|", text, re.MULTILINE)
    assert rows == [(f.name, ", ".join(f"`{s}`" for s in f.suffixes)) for f in FORMATS]


def test_every_ending_is_of_one_format_in_any_case_and_leaves_the_name() -> None:
    assert len(SUFFIXES) == len(set(SUFFIXES))
    for found in FORMATS:
        for suffix in found.suffixes:
            for name in (f"a.b{suffix}", f"a.b{suffix.upper()}"):
                assert format_by_name(name) is found and stem(f"folder.nii/{name}") == "a.b", name
    assert format_by_name("a.nii.txt") is None and stem("a.gz") == "a.gz"


def test_a_file_without_a_known_ending_is_dicom_by_its_mark_or_nibabels(tmp_path: Path) -> None:
    series = save_dicom(tmp_path / "series", scan())
    unnamed = (series / "1.2.3-00.dcm").rename(series / "no_ending")
    assert format_of(unnamed) is DICOM and len(source_files(unnamed)) == 10 and source_files(unnamed)[0] == unnamed
    (tmp_path / "a.unknown").write_text("text")
    assert format_of(tmp_path / "a.unknown") is NIFTI
    with pytest.raises(BadVolume, match="no such file"):
        open_image(str(tmp_path / "missing"))


def test_upper_case_files_are_found_read_and_checked_as_others(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("A.NII", "B.NII.GZ"):
        save_nifti(data / name, scan())
    save_itk(data / "c.mhd", scan())
    (data / "c.mhd").rename(data / "C.MHD")
    header, voxels = save_pair(data / "D", upper=True)
    found = [Path(unit.path).name for unit in walk([data])]
    assert found == ["A.NII", "B.NII.GZ", "C.MHD", "D.HDR"] == [p.name for p in scans_in(data)]
    for name in found:
        assert np.array_equal(open_image(str(data / name)).read(0), scan()), name
    assert source_files(data / "C.MHD") == [data / "C.MHD", data / "c.raw"] and source_files(header) == [header, voxels]
    (data / "A.NII").write_bytes((data / "A.NII").read_bytes()[:-500])
    with pytest.raises(BadVolume, match="truncated"):
        open_image(str(data / "A.NII"))


def test_a_compressed_pair_is_made_of_both_files(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(scan(), np.eye(4)), tmp_path / "a.img.gz")
    assert source_files(tmp_path / "a.img.gz") == [tmp_path / "a.img.gz", tmp_path / "a.hdr.gz"]
    assert [Path(unit.path).name for unit in walk([tmp_path])] == ["a.img.gz"] == [p.name for p in scans_in(tmp_path)]


def test_bzip2_is_indexed(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii.bz2", scan())
    assert [Path(unit.path).name for unit in walk([tmp_path])] == ["a.nii.bz2"]
    assert np.array_equal(open_image(str(tmp_path / "a.nii.bz2")).read(0), scan())


@pytest.mark.skipif(find_spec("backports") is not None, reason="the package for zstandard may be here")
def test_zstandard_without_its_package_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.nii.zst").write_bytes(bytes(400))
    with pytest.raises(BadVolume, match="cannot be opened"):
        open_image(str(tmp_path / "a.nii.zst"))


def test_a_pair_is_one_case_of_a_split(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        save_pair(tmp_path / folder / "one")
        save_nifti(tmp_path / folder / "TWO.NII.GZ", scan())
    rows = find_pairs(tmp_path / "images", tmp_path / "labels", None)
    assert [(row["case"], row["image"].name, row["label"].name) for row in rows] == [
        ("TWO", "TWO.NII.GZ", "TWO.NII.GZ"), ("one", "one.hdr", "one.hdr"),
    ]  # fmt: skip


def test_an_upper_case_files_header_is_kept_by_its_prediction(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "A.NII.GZ", scan().astype(np.float32))
    image = nib.load(path)
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(image.affine, code=1)
    nib.save(image, path)
    case = prepare_case(Item((str(path),), None, "a"), load_recipe("BTCV"))
    header = restore_prediction(case.image[0] * 0, case).header
    assert header.get_xyzt_units() == ("mm", "sec") and int(header["qform_code"]) == 1


def test_doctor_says_for_which_formats_a_package_is() -> None:
    text = doctor.report()
    for package in ("pydicom", "SimpleITK"):
        line = next(line for line in text.splitlines() if line.strip().startswith(package))
        assert line.endswith("reads " + ", ".join(f.name for f in FORMATS if package in f.needs)), line
    assert PAIR.needs == NUMPY.needs == ()


# ---------------------------------------------------------------------- dinov2 predict, before the first scan


def test_predict_takes_every_format_of_a_folder_in_any_case(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for name in ("C.NII.GZ", ".hidden.nii.gz"):
        save_nifti(data / name, scan())
    save_pair(data / "p")
    for name in ("q.nrrd", "r.mhd"):
        save_itk(data / name, scan())
    save_dicom(data, scan(), series="1.2.3")
    save_dicom(data, scan(), series="1.2.4")
    (data / "notes.txt").write_text("text")
    (data / "folder.nii.gz").mkdir()
    jobs = plan_jobs([data], out, load_recipe("BTCV"))
    names = {Path(item.images[0]).name: target for item, target in jobs}
    assert list(names) == ["1.2.3-00.dcm", "1.2.4-00.dcm", "C.NII.GZ", "p.hdr", "q.nrrd", "r.mhd"]
    assert names["C.NII.GZ"] == out / "C.nii.gz" and names["1.2.4-00.dcm"] == out / "1.2.4-00.nii.gz"
    for item, _ in jobs:
        assert np.array_equal(open_image(item.images[0]).read(0).shape, scan().shape)


def test_predict_refuses_two_scans_of_one_result_before_the_first(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii.gz", scan())
    save_itk(tmp_path / "a.nrrd", scan())
    with pytest.raises(BadInput, match=r"a\.nii\.gz and a\.nrrd would both become a\.nii\.gz"):
        plan_jobs([tmp_path], tmp_path / "out", load_recipe("BTCV"))


def test_predict_never_replaces_an_input(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", scan())
    (tmp_path / "link").symlink_to(tmp_path)
    for inputs, output in (([tmp_path], tmp_path / "link"), ([path], tmp_path / "link" / "a.nii.gz")):
        with pytest.raises(BadInput, match="would replace the input"):
            plan_jobs(inputs, output, load_recipe("BTCV"))


def test_predict_names_a_folder_without_scans(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(BadInput, match="or DICOM file in it"):
        plan_jobs([tmp_path], tmp_path / "out", load_recipe("BTCV"))
    assert main(["predict", "--weights", str(tmp_path / "no.pth"), "--input", str(tmp_path), "--output", "x"]) == 2


def touch_cases(folder: Path, *names: str) -> Path:
    for name in names:
        save_nifti(folder / name, scan())
    return folder


def planned(folder: Path, recipe: str) -> dict[str, list[str]]:
    """Result -> names of the files it is made from, in order."""
    jobs = plan_jobs([folder], folder.parent / "out", load_recipe(recipe))
    return {target.name: [Path(p).name for p in item.images] for item, target in jobs}


def test_predict_puts_nnunets_channels_together_and_names_the_result_as_the_case(tmp_path: Path) -> None:
    names = [f"{case}_000{c}.nii.gz" for case in ("b", "a_1") for c in (2, 0, 3, 1)]
    found = planned(touch_cases(tmp_path / "imagesTs", *names), "BraTS")
    assert list(found.items()) == [(f"{case}.nii.gz", [f"{case}_000{c}.nii.gz" for c in range(4)]) for case in ("a_1", "b")]
    save_dicom(tmp_path / "imagesTs" / "c_0000", scan())
    for c in (1, 2, 3):
        save_itk(tmp_path / "imagesTs" / f"c_000{c}.nrrd", scan())
    found = planned(tmp_path / "imagesTs", "BraTS")
    assert found["c.nii.gz"] == ["c_0000", "c_0001.nrrd", "c_0002.nrrd", "c_0003.nrrd"] and len(found) == 3


def test_predict_leaves_out_the_channels_number_of_the_only_channel_and_no_other_number(tmp_path: Path) -> None:
    """Of one channel, `x_0001` is a numbered scan, and so is `y_0000` beside `y_0001`."""
    names = ["_0000.nii.gz", "a_0000.nii.gz", "a_1_0000.nii.gz", "x_0001.nii.gz", "y_0000.nii.gz", "y_0001.nii.gz", "z.nii.gz"]
    found = planned(touch_cases(tmp_path / "imagesTs", *names), "BTCV")
    results = ["_0000.nii.gz", "a.nii.gz", "a_1.nii.gz", "x_0001.nii.gz", "y_0000.nii.gz", "y_0001.nii.gz", "z.nii.gz"]
    assert found == {result: [name] for result, name in zip(results, names, strict=True)}
    series = save_dicom(tmp_path / "slices", scan())
    for k, path in enumerate(sorted(series.iterdir())):
        path.rename(series / f"IM_{k:04}.dcm")
    assert planned(series, "BTCV") == {"IM_0000.nii.gz": ["IM_0000.dcm"]}
    touch_cases(tmp_path / "imagesTs", "a.nii.gz")
    with pytest.raises(BadInput, match=r"a\.nii\.gz and a_0000\.nii\.gz would both become a\.nii\.gz"):
        planned(tmp_path / "imagesTs", "BTCV")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda folder: (folder / "b_0002.nii.gz").unlink(), "b has no b_0002, and BraTS has 4 channels"),
        (lambda folder: (folder / "a_0000.nii.gz").unlink(), "a has no a_0000, and"),
        (lambda folder: touch_cases(folder, "b_0004.nii.gz"), "b_0004.nii.gz is one file too many: BraTS has 4 channels"),
        (lambda folder: touch_cases(folder, "b_0001.nii"), "b_0001.nii(.gz)? is one file too many"),
        (lambda folder: touch_cases(folder, "t1.nii.gz"), "t1.nii.gz holds 1 channels, BraTS has 4: .*CASE_0000 to CASE_0003"),
        (lambda folder: touch_cases(folder, "c_2024.nii.gz"), "c_2024.nii.gz holds 1 channels"),
    ],
)  # fmt: skip
def test_predict_refuses_cases_of_other_channels_by_name(tmp_path: Path, change: Callable[[Path], object], words: str) -> None:
    folder = touch_cases(tmp_path / "imagesTs", *(f"{case}_000{c}.nii.gz" for case in "ab" for c in range(4)))
    assert list(planned(folder, "BraTS")) == ["a.nii.gz", "b.nii.gz"]
    change(folder)
    with pytest.raises(BadInput, match=f"--input .*imagesTs: {words}"):
        planned(folder, "BraTS")


def test_predict_takes_files_that_hold_all_channels_and_leaves_damaged_ones_to_their_turn(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    save_nifti(folder / "whole.nii.gz", np.stack([scan(i) for i in range(4)], -1))
    (folder / "damaged.nii.gz").write_bytes(b"no image")
    assert planned(folder, "BraTS") == {name: [name] for name in ("damaged.nii.gz", "whole.nii.gz")}
