"""Folders to a list: every format read the same, every bad file named, nothing read twice."""

from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dinov2.cli import main
from dinov2.data import read_datalist, write_datalist
from dinov2.data.cache.folder import VolumeCache
from dinov2.data.cache.store import load_volume
from dinov2.data.corpus.index import command as index_command
from dinov2.data.corpus.index import examine as examine_module
from dinov2.data.corpus.index import walk as walk_module
from dinov2.data.corpus.index.examine import (
    PASSING,
    ExamineOptions,
    Row,
    canonical_flips,
    content_sha,
    examine_unit,
    problem,
)
from dinov2.data.corpus.index.journal import Journal, journal_path, read_journal
from dinov2.data.corpus.index.metadata import hashed_id
from dinov2.data.corpus.index.walk import Unit, walk
from dinov2.data.corpus.overlap import seen_in
from dinov2.data.volumes.opening import open_volume
from dinov2.errors import BadInput
from dinov2.run.data.index import shard_commands
from tests.conftest import BUNDLED
from tests.unit.data.corpus.deadly import examine_until_a

SPACING = (0.75, 1.25, 3.0)


def scan(seed: int = 0, shape: tuple[int, int, int] = (14, 12, 10)) -> np.ndarray:
    """[14, 12, 10] int16, not symmetric in any axis."""
    ramp = np.add.outer(np.add.outer(np.arange(shape[0]), 2 * np.arange(shape[1])), 3 * np.arange(shape[2]))
    return (20 * ramp + np.random.default_rng(seed).integers(-300, 300, shape)).astype(np.int16)


def save_nifti(path: Path, voxels: np.ndarray, spacing: tuple[float, ...] = SPACING) -> Path:
    image = nib.Nifti1Image(voxels, np.diag([*spacing[:3], 1.0]) if all(spacing) else None)  # the header's spacing alone
    image.header.set_zooms((*spacing, *[0.0] * (voxels.ndim - len(spacing)))[: voxels.ndim])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def save_itk(path: Path, voxels: np.ndarray, compress: bool = False) -> Path:
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    image.SetSpacing(SPACING)
    sitk.WriteImage(image, str(path), compress)
    return path


def save_dicom(
    folder: Path,
    voxels: np.ndarray,
    patient: str = "Doe^Jane",
    series: str = "1.2.3",
    modality: str = "CT",
    number: int | None = None,
    description: str = "",
) -> Path:
    """A series with a slope, an offset, and file names that do not follow the slices' order."""
    pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir(parents=True, exist_ok=True)
    for k in range(voxels.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, f"{series}.{k + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header = Dataset()
        header.file_meta = meta
        header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, f"{series}.{k + 1}"
        header.SeriesInstanceUID, header.PatientID, header.Modality, header.BodyPartExamined = series, patient, modality, "KNEE"
        header.SeriesNumber, header.SeriesDescription = number, description
        header.Columns, header.Rows = voxels.shape[:2]
        header.PixelSpacing, header.SliceThickness = [SPACING[1], SPACING[0]], SPACING[2]
        header.ImageOrientationPatient, header.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [5, 7, SPACING[2] * k - 30]
        header.SamplesPerPixel, header.PhotometricInterpretation, header.BitsAllocated = 1, "MONOCHROME2", 16
        header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 15, 1
        header.RescaleSlope, header.RescaleIntercept = 2, -1024
        header.PixelData = ((voxels[:, :, k].T.astype(np.int32) + 1024) // 2).astype("<i2").tobytes()
        header.save_as(folder / f"{series}-{(7 * k) % 97:02d}.dcm", enforce_file_format=True)
    return folder


def compress_dicom(path: Path, how: str) -> None:
    """A slice's voxels by run lengths ("RLE"), which pydicom writes, or as "JPEG" (lossless) or "JPEG2000", as ITK does."""
    pydicom, sitk = pytest.importorskip("pydicom"), pytest.importorskip("SimpleITK")
    header = pydicom.dcmread(path)
    if how == "RLE":
        header.compress(pydicom.uid.RLELossless)
    else:
        kind = f"<{'i' if header.PixelRepresentation else 'u'}{header.BitsAllocated // 8}"
        image = sitk.GetImageFromArray(np.frombuffer(header.PixelData, kind).reshape(1, header.Rows, header.Columns))
        with tempfile.TemporaryDirectory() as folder:
            name = str(Path(folder) / "a.dcm")
            sitk.WriteImage(image, name, useCompression=True, imageIO="GDCMImageIO", compressor=how)
            written = pydicom.dcmread(name)
        header.file_meta.TransferSyntaxUID = written.file_meta.TransferSyntaxUID
        header["PixelData"] = written["PixelData"]
    header.save_as(path, enforce_file_format=True)


def run(folder: Path, output: Path, *flags: str) -> tuple[list[dict], dict[str, tuple[str, str]]]:
    """List and quarantine {name: (reason, detail)} of an index in this process."""
    code = main(["index", str(folder), "--output", str(output), "--workers", "0", *flags])
    listed, rows = json.loads(output.read_text()), json.loads(output.with_name("list.quarantine.json").read_text())
    assert code == (0 if listed else 2)
    return listed, {os.path.basename(r["path"]): (r["reason"], r["detail"]) for r in rows}


# ---------------------------------------------------------------------- formats


def test_the_same_voxels_in_any_format_are_one_volume(tmp_path: Path) -> None:
    voxels, data = scan() // 2 * 2, tmp_path / "data"
    save_nifti(data / "a.nii.gz", voxels)
    save_nifti(data / "b.nii", voxels.astype(np.float64)[::-1])  # another type, a flipped axis
    save_nifti(data / "c.hdr", voxels)
    for name, compress in (("d.nrrd", True), ("e.nhdr", False), ("f.mha", True), ("g.mhd", False)):
        save_itk(data / name, voxels, compress)
    np.save(data / "h.npy", voxels)
    np.savez_compressed(data / "i.npz", voxels)
    for name in ("h", "i"):
        (data / f"{name}.json").write_text(json.dumps({"spacing": SPACING}))
    series = save_dicom(data / "z", voxels)
    (series / "1.2.3-00.dcm").rename(series / "no_ending")
    listed, quarantine = run(data, tmp_path / "list.json")
    assert [Path(e["image"]).name for e in listed] == ["a.nii.gz"]
    others = ["b.nii", "c.hdr", "d.nrrd", "e.nhdr", "f.mha", "g.mhd", "h.npy", "i.npz"]
    assert set(quarantine) == {*others, "1.2.3-07.dcm"} and {reason for reason, _ in quarantine.values()} == {"duplicate"}
    for path in [*(data / name for name in others), series / "1.2.3-07.dcm"]:
        one = {"image": str(path), "shape": [14, 12, 10], "spacing": SPACING}
        write_datalist(tmp_path / "one.json", [one])
        raw = open_volume(read_datalist(tmp_path / "one.json").entries[0])
        expected = voxels[::-1] if path.name == "b.nii" else voxels
        np.testing.assert_array_equal(raw.read(), expected, err_msg=path.name)
        assert raw.spacing_mm == pytest.approx(SPACING)


def test_a_content_hash_is_of_the_voxels_and_of_nothing_else(tmp_path: Path) -> None:
    voxels = scan()
    shas = []
    changed = voxels + (voxels == voxels[3, 4, 5])
    for name, array, spacing in (
        ("a.nii.gz", voxels, SPACING),
        ("b.nii", voxels[:, ::-1, ::-1], (2, 2, 2)),
        ("c.nii", changed, SPACING),
    ):
        path = save_nifti(tmp_path / name, array, spacing)
        write_datalist(tmp_path / "l.json", [{"image": str(path), "shape": [14, 12, 10]}])
        shas.append(content_sha(read_datalist(tmp_path / "l.json").entries[0]))
    assert shas[0] == shas[1] != shas[2]
    even = np.ones((4, 5, 6), np.float32)
    assert canonical_flips(even) == (slice(None),) * 3


def test_an_entry_says_what_the_file_is(tmp_path: Path) -> None:
    voxels = np.zeros((14, 12, 10), np.int16)
    voxels[2:11, 3:12, 1:9] = scan()[2:11, 3:12, 1:9] + 400
    save_dicom(tmp_path / "data" / "knee_set", voxels)
    [entry], _ = run(tmp_path / "data", tmp_path / "list.json", "--pattern", "{dataset}/*")
    assert entry["image"] == "data/knee_set/1.2.3-00.dcm" and entry["shape"] == [14, 12, 10] and entry["spacing"] == [*SPACING]
    assert (entry["modality"], entry["organ"], entry["dataset"]) == ("CT", "knee", "knee_set")
    assert entry["orientation"] == "LPS" and entry["dtype"] == "int16"
    assert entry["foreground"] == [[2, 11], [3, 12], [1, 9]]
    assert entry["percentiles"] == pytest.approx(list(np.percentile(voxels // 2 * 2, (0.05, 99.95))), rel=1e-5)
    assert "Doe" not in json.dumps(entry) and len(entry["patient"]) == 16
    [kept], _ = run(tmp_path / "data", tmp_path / "list.json", "--keep-ids")
    assert kept["patient"] == "Doe^Jane"
    [salted], _ = run(tmp_path / "data", tmp_path / "list.json", "--id-salt", "secret")
    assert salted["patient"] not in (kept["patient"], entry["patient"])
    assert "secret" not in (tmp_path / "list.index.jsonl").read_text()


def test_channels_become_entries_and_time_does_not(tmp_path: Path) -> None:
    voxels = np.stack([scan(seed) for seed in range(3)], -1)
    decathlon = tmp_path / "data" / "tumours"
    save_nifti(decathlon / "images" / "a.nii.gz", voxels, (*SPACING, 1.0))
    (decathlon / "dataset.json").write_text('{"name": "Tumours", "modality": {"0": "FLAIR", "1": "T1w", "2": "T2w"}}')
    save_nifti(tmp_path / "data" / "rest" / "bold.nii.gz", voxels[::-1], (*SPACING, 2.0))
    save_nifti(tmp_path / "data" / "rest" / "unexplained.nii.gz", voxels[:, ::-1] + 1)
    save_itk_vector(tmp_path / "data" / "vector.nii.gz", voxels[..., 1:] + 2)
    listed, quarantine = run(tmp_path / "data", tmp_path / "list.json")
    found = {(Path(e["image"]).name, e.get("axes"), e.get("channel"), e.get("channel_name")) for e in listed}
    decathlon_rows = {("a.nii.gz", "xyzc", c, n) for c, n in enumerate(("FLAIR", "T1w", "T2w"))}
    vector_rows = {("vector.nii.gz", "xyzc", c, None) for c in range(2)}
    assert found == decathlon_rows | vector_rows | {("bold.nii.gz", "xyzt", None, None)}
    assert quarantine["unexplained.nii.gz"][0] == "axes" and "--fourth-axis" in quarantine["unexplained.nii.gz"][1]
    by_channel = {e.channel: e for e in read_datalist(tmp_path / "list.json").entries if "tumours" in e.image}
    np.testing.assert_array_equal(open_volume(by_channel[2]).read(), voxels[..., 2])
    assert by_channel[1].extra["dataset"] == "Tumours"
    listed, quarantine = run(tmp_path / "data", tmp_path / "list.json", "--fourth-axis", "channels")
    assert len(listed) == 9 and not quarantine


def save_itk_vector(path: Path, voxels: np.ndarray) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.transpose(2, 1, 0, 3)), isVector=True)
    sitk.WriteImage(image, str(path))


def test_label_maps_are_marked(tmp_path: Path) -> None:
    data = tmp_path / "data"
    save_nifti(data / "scan.nii.gz", scan())
    save_nifti(data / "x.nii.gz", (scan() > 300).astype(np.uint8) + (scan() > 700))
    save_nifti(data / "lung_mask.nii.gz", scan(1))
    listed, _ = run(data, tmp_path / "list.json")
    assert {Path(e["image"]).name for e in listed if e.get("label_map")} == {"x.nii.gz", "lung_mask.nii.gz"}


def test_training_and_its_cache_take_a_series_and_notice_a_changed_slice(tmp_path: Path) -> None:
    series = save_dicom(tmp_path / "data", scan())
    run(tmp_path / "data", tmp_path / "list.json")
    entry = read_datalist(tmp_path / "list.json").entries[0]
    cache = VolumeCache(tmp_path / "cache")
    before, key = load_volume(entry, 0, cache), cache.key(entry, 0)
    assert before.voxels.shape == (1, 14, 12, 10) and cache.load(entry, 0) is not None
    slice_file = series / "1.2.3-14.dcm"
    slice_file.write_bytes(slice_file.read_bytes()[:-2] + b"\x07\x07")
    assert VolumeCache(tmp_path / "cache").key(entry, 0) != key


# ---------------------------------------------------------------------- bad input


def announce(path: Path, shape: tuple[int, ...], ending: str) -> None:
    """A file of about 1 KB whose header asks for 40 GB."""
    if ending == ".nii":
        header = nib.Nifti1Header()
        header.set_data_dtype(np.float32)
        header.set_data_shape(shape)
        path.write_bytes(header.binaryblock + bytes(700))
    elif ending == ".nii.gz":
        announce(path.with_suffix(".tmp"), shape, ".nii")
        path.write_bytes(gzip.compress(path.with_suffix(".tmp").read_bytes()))
        path.with_suffix(".tmp").unlink()
    elif ending == ".nrrd":
        sizes = " ".join(map(str, shape))
        text = f"NRRD0004\ntype: float\ndimension: 3\nsizes: {sizes}\nspacings: 1 1 1\nencoding: raw\nendian: little\n\n"
        path.write_bytes(text.encode() + bytes(900))
    elif ending == ".mha":
        sizes = " ".join(map(str, shape))
        text = f"ObjectType = Image\nNDims = 3\nDimSize = {sizes}\nElementType = MET_FLOAT\nElementDataFile = LOCAL\n"
        path.write_bytes(text.encode() + bytes(900))
    elif ending == ".npy":
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            file.write(bytes(900))


def test_every_bad_file_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    data = tmp_path / "data"
    save_nifti(data / "good.nii.gz", scan())
    (data / "zeros.nii.gz").write_bytes(bytes(5000))
    (data / "text.nrrd").write_text("hello")
    (data / "text.mha").write_text("hello")
    (data / "text.npy").write_text("hello")
    (data / "text.npz").write_text("hello")
    (data / "text.dcm").write_text("hello")
    (data / "empty.nii").write_bytes(b"")
    np.save(data / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(data / "nospacing.npy", scan(11))
    for ending in (".nii", ".nii.gz", ".nrrd", ".mha", ".npy"):
        announce(data / f"bomb{ending}", (2200, 2200, 2200), ending)
    for name in ("cut.nii.gz", "cut.nii"):
        path = save_nifti(data / name, scan(1))
        path.write_bytes(path.read_bytes()[:-900])
    path = save_itk(data / "cut.nrrd", scan(1), compress=True)
    path.write_bytes(path.read_bytes()[:-900])
    holed = scan(2).astype(np.float32)
    holed[3, 3, 3] = np.nan
    save_nifti(data / "nan.nii.gz", holed)
    save_nifti(data / "constant.nii.gz", np.full((12, 12, 12), 7, np.int16))
    save_nifti(data / "thin.nii.gz", scan(3)[:, :, :5])
    save_nifti(data / "zero_spacing.nii.gz", scan(4), (1, 0, 1))
    save_nifti(data / "huge_spacing.nii.gz", scan(5), (1, 1, 900))
    save_nifti(data / "copy.nii", scan())
    save_nifti(data / "complex.nii.gz", scan(6).astype(np.complex64))
    (data / "sidecar.json").write_text("[1")
    save_nifti(data / "sidecar.nii.gz", scan(7))
    (data / "loop").symlink_to(data)
    (data / "self.nii.gz").symlink_to(data / "self.nii.gz")
    (data / "lost.nii.gz").symlink_to(data / "nowhere.nii.gz")
    save_dicom(data / "missing", scan(8), series="1.2.8")
    (data / "missing" / "1.2.8-28.dcm").unlink()
    save_dicom(data / "mixed", scan(9), series="1.2.9")
    save_dicom(data / "more", scan(9, (10, 12, 4)), series="1.2.9")
    for path in (data / "more").iterdir():
        path.rename(data / "mixed" / f"more-{path.name}")
    shutil.rmtree(data / "more")
    save_dicom(data / "short", scan(10), series="1.2.10")
    short = data / "short" / "1.2.10-00.dcm"
    short.write_bytes(short.read_bytes()[:-200])
    listed, quarantine = run(data, tmp_path / "list.json")
    assert [Path(e["image"]).name for e in listed] == ["copy.nii"]
    reasons = {name: reason for name, (reason, _) in quarantine.items()}
    assert reasons.pop("good.nii.gz") == "duplicate"  # of copy.nii, which comes first
    truncated = ("bomb.nii", "bomb.nii.gz", "bomb.nrrd", "bomb.mha", "cut.nii", "cut.nii.gz", "1.2.10-00.dcm")
    unreadable = ("zeros.nii.gz", "text.nrrd", "text.mha", "text.npy", "text.npz", "text.dcm", "empty.nii", "pickle.npy")
    assert {n: reasons.pop(n) for n in truncated} == dict.fromkeys(truncated, "truncated")
    assert {n: reasons.pop(n) for n in unreadable} == dict.fromkeys(unreadable, "unreadable")
    assert reasons == {
        "bomb.npy": "unreadable", "cut.nrrd": "truncated", "nospacing.npy": "spacing", "nan.nii.gz": "non_finite",
        "constant.nii.gz": "constant", "thin.nii.gz": "small_axis", "zero_spacing.nii.gz": "spacing",
        "huge_spacing.nii.gz": "spacing", "complex.nii.gz": "not_real_numbers", "sidecar.nii.gz": "sidecar",
        "loop": "symlink_loop", "self.nii.gz": "unreadable", "lost.nii.gz": "missing", "1.2.8-00.dcm": "missing_slices",
        "1.2.9-00.dcm": "mixed_slices",
    }  # fmt: skip
    assert "1 of 10 slices are missing" in quarantine["1.2.8-00.dcm"][1]
    assert all(detail and "\n" not in detail and str(data) not in detail[:10] for _, detail in quarantine.values())


def test_limits_can_be_moved_without_reading_anything_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holed = scan(2).astype(np.float32)
    holed[3, 3, 3] = np.nan
    save_nifti(tmp_path / "data" / "nan.nii.gz", holed)
    save_nifti(tmp_path / "data" / "thin.nii.gz", scan(3)[:, :, :5])
    assert run(tmp_path / "data", tmp_path / "list.json")[0] == []
    monkeypatch.setattr("dinov2.data.corpus.index.command.examine", lambda *_: pytest.fail("examined again"))
    listed, quarantine = run(tmp_path / "data", tmp_path / "list.json", "--min-axis", "5", "--max-nan", "0.01")
    assert len(listed) == 2 and not quarantine


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may read."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def test_what_may_not_be_read_is_named(open_folder: Path) -> None:
    data = open_folder / "data"
    save_nifti(data / "good.nii.gz", scan())
    save_nifti(data / "secret.nii.gz", scan(1)).chmod(0)
    save_nifti(data / "closed" / "a.nii.gz", scan(2))
    (data / "closed").chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        listed, quarantine = run(data, open_folder / "list.json")
    finally:
        os.seteuid(user)
        (data / "closed").chmod(0o700)
    assert len(listed) == 1 and {n: r for n, (r, _) in quarantine.items()} == {
        "secret.nii.gz": "permission", "closed": "permission"
    }  # fmt: skip


def test_names_that_are_no_text_are_set_aside_by_name_and_refused_elsewhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """JSON and Parquet hold text, and several readers take nothing else."""
    good = save_nifti(tmp_path / "data" / "a.nii", scan())
    bad = os.fsdecode(os.fsencode(tmp_path / "data") + b"/latin1-\xe9.nii")
    shutil.copy(good, bad)
    Path(os.fsdecode(os.fsencode(tmp_path / "data") + b"/f\xfc")).mkdir()
    listed, quarantine = run(tmp_path / "data", tmp_path / "list.json")
    assert len(listed) == 1 and {reason for reason, _ in quarantine.values()} == {"name"} and len(quarantine) == 2
    (tmp_path / "bad.json").write_text(json.dumps([{"image": bad, "shape": [14, 12, 10]}]))
    capfd.readouterr()
    words = ["embed", "LIST", "--weights", "demo", "--output", str(tmp_path / "o.parquet")]
    for command in (
        [w.replace("LIST", str(tmp_path / "bad.json")) for w in words],
        ["predict", "--weights", "demo", "--input", bad, "--output", str(tmp_path / "o.nii.gz")],
        ["classify", "--probe", "p.pth", "--input", bad],
        ["train", f"train.dataset_path={tmp_path / 'bad.json'}", f"--output-dir={tmp_path / 'run'}"],
        ["train", f"train.dataset_path={bad}", f"--output-dir={tmp_path / 'run'}"],
        ["index", bad, "--output", str(tmp_path / "other.json")],
    ):
        assert main(command) == 2
        said = capfd.readouterr().err
        assert "not in UTF-8: rename it" in said and "Traceback" not in said, said


def test_names_of_any_letters_and_lengths_are_listed_and_found_again(tmp_path: Path) -> None:
    data = tmp_path / "data"
    names = ["雪だるま ☃ \"q'.nii.gz", "n" * 240 + ".nii.gz", "line\nbreak.nii"]
    for seed, name in enumerate(names):
        plain = save_nifti(tmp_path / ("plain.nii" if name.endswith(".nii") else "plain.nii.gz"), scan(seed))
        data.mkdir(exist_ok=True)
        plain.rename(data / name)
    listed, quarantine = run(data, tmp_path / "list.json")
    assert sorted(Path(e["image"]).name for e in listed) == sorted(names) and not quarantine
    for entry in read_datalist(tmp_path / "list.json").entries:
        assert open_volume(entry).read().shape == (14, 12, 10)


def test_a_folder_without_volumes_and_a_missing_one_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    for folder, words in ((tmp_path / "empty", "no NIfTI, Analyze"), (tmp_path / "nowhere", "no such folder")):
        assert main(["index", str(folder), "--output", str(tmp_path / "list.json")]) == 2
        assert words in capsys.readouterr().err
    for flags, words in ((("--shard", "5/4"), "--shard 5/4"), (("--pattern", "{organism}"), "{organism} is none of")):
        assert main(["index", str(tmp_path), "--output", str(tmp_path / "list.json"), *flags]) == 2
        assert words in capsys.readouterr().err


def test_a_full_disk_stops_with_a_line_and_the_same_command_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(20):
        save_nifti(tmp_path / "data" / f"{seed}.nii", scan(seed))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))  # a file can hold no more, as on a full disk
    try:
        code = main(["index", str(tmp_path / "data"), "--output", str(tmp_path / "list.json"), "--workers", "0"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr()
    assert code == 2 and "make room" in said.err and not (tmp_path / "list.json").exists()
    listed, _ = run(tmp_path / "data", tmp_path / "list.json")
    assert len(listed) == 20
    todo = int(capsys.readouterr().out.split("; ")[1].split(" new")[0])
    assert 0 < todo < 20  # what fitted was kept


# ---------------------------------------------------------------------- processes, runs


def test_a_second_run_looks_only_at_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "list.json"
    for seed in range(3):
        save_nifti(data / f"{seed}.nii", scan(seed))
    first = run(data, out)
    assert run(data, out) == first and "; 0 new or changed" in capsys.readouterr().out
    save_nifti(data / "1.nii", scan(7))
    (data / "2.json").write_text('{"organ": "knee"}')
    (data / "0.nii").unlink()
    listed, _ = run(data, out)
    assert "2 files and series" in (said := capsys.readouterr().out) and "; 2 new or changed" in said
    assert [Path(e["image"]).name for e in listed] == ["1.nii", "2.nii"] and listed[1]["organ"] == "knee"
    assert listed[0]["sha"] != first[0][1]["sha"]


def test_what_ended_a_process_is_tried_again_in_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate("ab"):
        save_nifti(tmp_path / "data" / f"{name}.nii", scan(seed))
    words = ["index", str(tmp_path / "data"), "--output", str(tmp_path / "list.json"), "--workers", "1"]
    with monkeypatch.context() as deadly:
        deadly.setattr(index_command, "examine", examine_until_a)
        assert main(words) == 0
        assert main(words) == 0
    assert capsys.readouterr().out.count("1 set aside: 1 unreadable") == 2
    assert main(words) == 0 and "2 volumes" in capsys.readouterr().out


def test_a_file_that_may_be_read_now_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """chmod changes neither its size nor its time; nor does the installation of a missing library."""
    for seed, reason in enumerate(sorted(PASSING - {"memory"})):
        save_nifti(tmp_path / "data" / f"{reason}.nii", scan(seed))
    save_nifti(tmp_path / "data" / "constant.nii", np.zeros((16, 16, 16)))

    def refused(unit: Unit, options: ExamineOptions) -> list[Row]:
        reason = Path(unit.path).stem
        return [problem(unit.path, reason, "for now")]

    with monkeypatch.context() as before:
        before.setattr(examine_module, "examine_unit", refused)
        assert len(run(tmp_path / "data", tmp_path / "list.json")[1]) == 6
    seen = []

    def noted(unit: Unit, options: ExamineOptions) -> list[Row]:
        seen.append(Path(unit.path).stem)
        return examine_unit(unit, options)

    with monkeypatch.context() as watched:
        watched.setattr(examine_module, "examine_unit", noted)
        listed, quarantine = run(tmp_path / "data", tmp_path / "list.json")
    assert sorted(seen) == sorted(PASSING - {"memory"}) and len(listed) == 5
    assert quarantine == {"constant.nii": ("constant", "for now")}


def test_a_series_of_an_earlier_versions_journal_is_examined_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows do not name the series."""
    save_nifti(tmp_path / "data" / "a.nii", scan())
    save_dicom(tmp_path / "data" / "series", scan(1), number=3)
    with monkeypatch.context() as earlier:
        earlier.setattr(walk_module, "_SERIES", ("", 0, 0))
        run(tmp_path / "data", tmp_path / "list.json")
    listed, _ = run(tmp_path / "data", tmp_path / "list.json")
    assert "2 files and series" in (said := capsys.readouterr().out) and said.count("; 1 new or changed") == 1
    assert [e.get("series") for e in listed] == [None, "3"]


def test_shards_merged_are_one_run(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for seed in range(12):
        save_nifti(data / f"{seed}.nii", scan(seed % 9))  # the last three are duplicates, of other shards too
    save_dicom(data / "series", scan(20))
    (data / "bad.nii").write_bytes(b"x")
    (data / "loop").symlink_to(data)
    whole = run(data, tmp_path / "list.json")
    assert len(whole[0]) == 10 and len(whole[1]) == 5
    parts = [tmp_path / f"part{i}.json" for i in range(1, 5)]
    for i, part in enumerate(parts, 1):
        assert main(["index", str(data), "--output", str(part), "--shard", f"{i}/4", "--workers", "0"]) == 0
    assert max(len(json.loads(p.read_text())) for p in parts) < 10
    (tmp_path / "merged").mkdir()
    merged = tmp_path / "merged" / "list.json"
    assert main(["index", "--merge", *map(str, parts), "--output", str(merged)]) == 0
    assert read_datalist(merged).entries == read_datalist(tmp_path / "list.json").entries
    for suffix in (".quarantine.json", ".index.jsonl"):
        assert merged.with_name("list" + suffix).read_bytes() == (tmp_path / f"list{suffix}").read_bytes()


def test_a_slurm_array_s_commands_write_what_one_run_does(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for seed in range(9):
        save_nifti(data / f"{seed}.nii", scan(seed % 7, (14, 12, 9 + seed)))
    flags = [str(data), "--min-axis", "10"]
    assert main(["index", *flags, "--output", str(tmp_path / "whole.json"), "--workers", "0"]) == 0
    rest = [*flags, "--output", str(tmp_path / "list.json"), f"--report={tmp_path / 'r.html'}"]
    shards, merge = shard_commands(rest, 3, cpus=1)
    assert [main(command) for command in (*shards, merge)] == [0, 0, 0, 0]
    assert (tmp_path / "list.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert (tmp_path / "r.html").exists() and len(list((tmp_path / "list.shards").iterdir())) == 9
    with pytest.raises(BadInput, match="leave them out"):
        shard_commands([*rest, "--shard", "1/2"], 3, cpus=1)


def test_two_indexes_do_not_write_the_same_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_nifti(tmp_path / "data" / "a.nii", scan())
    with Journal(journal_path(tmp_path / "list.json"), {}):
        assert main(["index", str(tmp_path / "data"), "--output", str(tmp_path / "list.json")]) == 2
    assert "another index writes it" in capsys.readouterr().err


def test_a_journal_killed_twice_keeps_all_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "list.index.jsonl"
    for unit in ("a", "b", "c"):
        with Journal(path, {}) as journal:
            journal.add(unit, "stamp", [{"path": unit}])
        with path.open("ab") as file:
            file.write(b'{"unit": "cut sho')
    with Journal(path, {}) as journal:
        assert [row["path"] for row in journal.rows()] == ["a", "b", "c"]
        assert journal.knows("b", "stamp") and not journal.knows("b", "other")


def test_a_folder_is_walked_once_by_whatever_name(tmp_path: Path) -> None:
    save_nifti(tmp_path / "data" / "a.nii", scan())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "link").symlink_to(tmp_path / "data")
    units = list(walk([tmp_path / "data", tmp_path / "other", tmp_path / "data"]))
    assert [u.path for u in units] == [str(tmp_path / "data" / "a.nii")]


def test_the_index_lists_every_real_volume(local_data: Path, tmp_path: Path) -> None:
    for name in ("stroke_mr", "head_mr", "chest_ct"):
        shutil.copytree(local_data / name, tmp_path / "data" / name)
    (tmp_path / "data" / "broken.nii.gz").write_bytes((BUNDLED / "sub-01_T1w_2mm.nii.gz").read_bytes()[:90000])
    listed, quarantine = run(tmp_path / "data", tmp_path / "list.json", "--pattern", "{dataset}")
    assert len(listed) == 6 and set(quarantine) == {"broken.nii.gz"}
    assert {(e["modality"], bool(e.get("label_map"))) for e in listed} == {("MR", False), ("CT", False), ("CT", True)}


# ---------------------------------------------------------------------- what is there and not understood


def with_channels(folder: Path, description: bytes) -> Path:
    """A data set of one volume of two channels, whose header gives the fourth axis a spacing."""
    save_nifti(folder / "imagesTr" / "c1.nii.gz", np.stack([scan(), scan(1)], -1), (*SPACING, 1.0))
    (folder / "dataset.json").write_bytes(description)
    return folder


DESCRIPTION = '{"name": "T\xe4", "modality": {"0": "T1", "1": "FLAIR"}}'


def test_a_description_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    data = with_channels(tmp_path / "data", b"\xef\xbb\xbf" + DESCRIPTION.encode())
    listed, quarantine = run(data, tmp_path / "list.json")
    assert [e["channel_name"] for e in listed] == ["T1", "FLAIR"] and listed[0]["dataset"] == "T\xe4" and not quarantine


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "list", "deep"])
def test_a_description_that_cannot_be_read_is_set_aside_and_so_is_what_it_may_explain(encoding: str, tmp_path: Path) -> None:
    content = {"list": b"[1]", "deep": b"[" * 200_000}.get(encoding) or DESCRIPTION.encode(encoding)
    data = with_channels(tmp_path / "data", content)
    save_nifti(data / "imagesTr" / "plain.nii.gz", scan(2))
    listed, quarantine = run(data, tmp_path / "list.json")
    assert [Path(e["image"]).name for e in listed] == ["plain.nii.gz"]
    assert {name: reason for name, (reason, _) in quarantine.items()} == {"dataset.json": "sidecar", "c1.nii.gz": "axes"}
    assert "cannot be used" in quarantine["dataset.json"][1] and "dataset.json, which may say" in quarantine["c1.nii.gz"][1]
    listed, quarantine = run(data, tmp_path / "list.json", "--fourth-axis", "channels")
    assert len(listed) == 3 and quarantine.keys() == {"dataset.json"}
    (data / "dataset.json").write_bytes(DESCRIPTION.encode())
    listed, quarantine = run(data, tmp_path / "list.json")
    assert [e.get("channel_name") for e in listed] == ["T1", "FLAIR", None] and not quarantine


def test_sidecars_in_other_encodings_and_of_other_kinds_are_read_or_named(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number, name in enumerate(("mark", "latin", "deep", "huge", "nan", "pipe", "zeros")):
        save_nifti(data / f"{name}.nii", scan(number))
    (data / "mark.json").write_bytes(b'\xef\xbb\xbf{"Modality": "PT"}')
    (data / "latin.json").write_bytes('{"Modality": "Sch\xe4del"}'.encode("latin-1"))
    (data / "deep.json").write_bytes(b"[" * 200_000)
    (data / "huge.json").write_bytes(b'{"spacing": [1' + b"0" * 400 + b", 1, 1]}")
    (data / "nan.json").write_bytes(b'{"spacing": [NaN, 1e999, 1]}')
    os.mkfifo(data / "pipe.json")
    (data / "zeros.json").symlink_to("/dev/zero")
    listed, quarantine = run(data, tmp_path / "list.json")
    assert [(e["image"], e["modality"]) for e in listed] == [("data/mark.nii", "PET")]
    assert {reason for reason, _ in quarantine.values()} == {"sidecar"} and len(quarantine) == 6
    assert "save it as UTF-8" in quarantine["latin.nii"][1] and "no regular file" in quarantine["pipe.nii"][1]


def test_a_series_in_two_folders_is_set_aside_by_name_and_its_phases_and_copies_are_not(tmp_path: Path) -> None:
    data, voxels = tmp_path / "data", scan()
    save_dicom(data / "whole", voxels, series="1.1")
    shutil.copytree(data / "whole", data / "whole_again")
    save_dicom(data / "phase0", scan(1), series="1.2")
    save_dicom(data / "phase1", scan(2), series="1.2")
    save_dicom(data / "below" / "first", scan(3), series="1.3")
    (data / "below" / "second").mkdir()
    for k, file in enumerate(sorted((data / "below" / "first").iterdir(), key=place_of)):
        if k >= 5:
            file.rename(data / "below" / "second" / file.name)
    listed, _ = run(data, tmp_path / "list.json", "--min-axis", "5")
    assert sorted(Path(e["image"]).parent.name for e in listed) == ["phase0", "phase1", "whole"]
    rows = json.loads((tmp_path / "list.quarantine.json").read_text())
    found = {Path(r["path"]).parent.name: (r["reason"], r["detail"]) for r in rows}
    assert found.pop("whole_again")[0] == "duplicate"
    assert found == {
        own: ("missing_slices", f"other slices of its series lie in {data / 'below' / other}: put them into one folder")
        for own, other in (("first", "second"), ("second", "first"))
    }


def place_of(path: Path) -> float:
    import pydicom

    return float(pydicom.dcmread(path).ImagePositionPatient[2])


# ---------------------------------------------------------------------- damaged journals


@pytest.mark.parametrize(
    "line", [b"{}", b"[]", b"5", b"null", b'{"unit": "a", "stamp": "s", "rows": 5}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_damaged_line_of_a_journal_is_named_and_what_it_had_is_examined_again(
    line: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "l.index.jsonl"
    with Journal(path, {}) as journal:
        for unit in ("a", "b", "c"):
            journal.add(unit, "s", [{"path": unit}])
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[3:]]) + b"\n")
    with pytest.raises(BadInput, match=r"l\.index\.jsonl, line 3: is damaged: start its shard again"):
        list(read_journal(path)[1])
    with Journal(path, {}) as journal:
        assert [journal.knows(unit, "s") for unit in "abc"] == [True, False, False]
        assert f"{path}, line 3: is damaged" in caplog.text


def test_a_flipped_bit_of_a_journal_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "l.index.jsonl"
    rows = [{"entry": {"image": "a.nii", "shape": [14, 12, 10], "spacing": [0.75, 1.25, 3.0]}, "non_finite": 0.0}]
    with Journal(path, {}) as journal:
        journal.add("a.nii", "s", rows)
    whole, start = path.read_bytes(), path.read_bytes().index(b"\n") + 1
    for place in np.random.default_rng(0).integers(start * 8, (len(whole) - 1) * 8, 300):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with Journal(path, {}) as journal:
            assert not journal.knows("a.nii", "s"), damaged


def test_a_journal_of_before_its_lines_had_checksums_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "l.index.jsonl"
    lines = [{"format": "dinov2-3d index 1", "options": {}}, {"unit": "a", "stamp": "s", "rows": [{"path": "a"}]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Journal(path, {}) as journal:
        assert journal.knows("a", "s") and list(journal.rows()) == [{"path": "a"}]


# ---------------------------------------------------------------------- privacy


def patients_of(path: Path) -> dict[str, str]:
    return {Path(e["image"]).parent.name: e["patient"] for e in json.loads(path.read_text())}


def test_ids_are_hashed_with_a_salt_that_stays_beside_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, patient in enumerate(("1234567", "7654321")):
        save_dicom(tmp_path / "data" / f"s{i}", scan(i), patient=patient, series=f"1.{i}")
    first, salt = tmp_path / "one" / "list.json", tmp_path / "one" / "patients.salt"
    run(tmp_path / "data", first)
    assert salt.stat().st_mode & 0o777 == 0o600 and len(salt.read_text().strip()) == 32
    patients = patients_of(first)
    assert len(set(patients.values())) == 2
    assert patients["s0"] == hashed_id("1234567", salt.read_text().strip()) != hashed_id("1234567", "")
    for file in (*first.parent.glob("*.json"), *first.parent.glob("*.jsonl")):
        assert "1234567" not in file.read_text() and salt.read_text().strip() not in file.read_text()
    capsys.readouterr()
    run(tmp_path / "data", first)
    assert "; 0 new or changed" in capsys.readouterr().out and patients_of(first) == patients
    run(tmp_path / "data", first.with_name("other") / "list.json")
    assert not set(patients_of(first.with_name("other") / "list.json").values()) & set(patients.values())
    parts = [first.with_name(f"part{i}.json") for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        assert main(["index", str(tmp_path / "data"), "--output", str(part), "--shard", f"{i}/2", "--workers", "0"]) == 0
    merged = tmp_path / "merged" / "list.json"
    assert main(["index", "--merge", *map(str, parts), "--output", str(merged)]) == 0
    assert patients_of(merged) == patients and (merged.parent / "patients.salt").read_text() == salt.read_text()
    for flags in (["--id-salt", "word"], ["--keep-ids"]):
        own = tmp_path / flags[0] / "list.json"
        run(tmp_path / "data", own, *flags)
        assert not (own.parent / "patients.salt").exists()
        assert patients_of(own)["s0"] == ("1234567" if flags == ["--keep-ids"] else hashed_id("1234567", "word"))


def test_an_empty_salt_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_nifti(tmp_path / "data" / "a.nii", scan())
    (tmp_path / "patients.salt").touch()
    assert main(["index", str(tmp_path / "data"), "--output", str(tmp_path / "list.json")]) == 2
    assert "patients.salt: is empty: remove it" in capfd.readouterr().err


def test_a_report_of_many_folders_names_none_of_them(tmp_path: Path) -> None:
    for i, name in enumerate(("Smith_John", "Miller_Ann")):
        save_nifti(tmp_path / "SCANS" / name / "ct" / "a.nii", scan(i))
    save_nifti(tmp_path / "SCANS" / "set" / "b.nii", scan(7))
    (tmp_path / "SCANS" / "set" / "dataset.json").write_text('{"name": "Tumours"}')
    folders = sorted(map(str, (tmp_path / "SCANS").iterdir()))
    words = ["--output", str(tmp_path / "list.json"), "--report", str(tmp_path / "r.html"), "--workers", "0"]
    assert main(["index", *folders, *words]) == 0
    text = (tmp_path / "r.html").read_text()
    assert not any(word in text for word in ("Smith", "John", "Miller", "Ann"))
    assert all(word in text for word in ("folder 1", "folder 2", "Tumours"))
    assert {e["dataset"] for e in json.loads((tmp_path / "list.json").read_text())} == {"Smith_John", "Miller_Ann", "Tumours"}
    record = json.dumps(seen_in(read_datalist(tmp_path / "list.json").entries).as_meta())
    assert "smith" not in record.lower()
