"""The folder of a DICOM series stands wherever the path of a scan does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dinov2.cli import main
from dinov2.data.cache.folder import VolumeCache
from dinov2.data.cache.store import load_volume
from dinov2.data.datalist import Entry, read_datalist
from dinov2.data.downstream.cases import Cases, check_headers, prepare_case, restore_prediction
from dinov2.data.downstream.lists import SPLITS, Item, read_downstream_datalist
from dinov2.data.downstream.recipes import load_recipe
from dinov2.data.volumes.formats import DICOM, format_of, is_scan_path, scans_in, source_files
from dinov2.data.volumes.opening import open_image
from dinov2.errors import BadInput, BadVolume
from dinov2.eval.segmentation_3d.predict import plan_jobs
from dinov2.features.encoder import load_encoder
from dinov2.features.scans import load_scan
from tests.unit.data.corpus.test_index import save_dicom, save_nifti, scan

BTCV = load_recipe("BTCV")


def test_a_folder_is_its_only_series_whatever_else_lies_in_it(tmp_path: Path) -> None:
    """And whatever its name ends in."""
    folder = save_dicom(tmp_path / "scan.nii.gz", scan())
    (folder / "notes.txt").write_text("text")
    (folder / "broken.dcm").write_bytes(b"no image")
    file = folder / "1.2.3-00.dcm"
    assert format_of(folder) is DICOM and is_scan_path(folder)
    found, of_file = open_image(str(folder)), open_image(str(file))
    assert np.array_equal(found.read(0), of_file.read(0)) and np.array_equal(found.affine, of_file.affine)
    assert set(source_files(folder)) == set(source_files(file)) == set(folder.glob("*.dcm"))
    case = prepare_case(Item((str(folder),), None, "a"), BTCV)
    assert restore_prediction(case.image[0] * 0, case).shape == found.shape


def test_several_series_are_named_with_the_file_to_give_instead(tmp_path: Path) -> None:
    save_dicom(tmp_path, scan(), series="1.2.3", number=7, description="T1w  axial")
    save_dicom(tmp_path, scan(shape=(14, 12, 8)), series="1.2.4")
    found = r"7 T1w axial \(10 slices, 1\.2\.3-00\.dcm\), without a name \(8 slices, 1\.2\.4-00\.dcm\)"
    words = rf"holds 2 DICOM series: {found}: give the named file of one"
    with pytest.raises(BadVolume, match=words) as caught:
        open_image(str(tmp_path))
    assert caught.value.reason == "mixed_slices" and "\n" not in str(caught.value)
    assert open_image(str(tmp_path / "1.2.4-00.dcm")).shape == (14, 12, 8)


def test_of_very_many_series_the_first_are_named(tmp_path: Path) -> None:
    for i in range(9):
        save_dicom(tmp_path, scan(shape=(14, 12, 1)), series=f"1.2.{i}")
    with pytest.raises(BadVolume, match=r"holds 9 DICOM series.*1\.2\.7-00\.dcm\), \.\.\.: give"):
        open_image(str(tmp_path))


def test_a_folder_without_a_series_says_so_or_what_is_wrong_with_its_files(tmp_path: Path) -> None:
    save_nifti(tmp_path / "plain" / "a.nii.gz", scan())
    assert not is_scan_path(tmp_path / "plain") and not is_scan_path(tmp_path / "none")
    with pytest.raises(BadVolume, match="plain: a folder without a DICOM series: give a scan's file"):
        open_image(str(tmp_path / "plain"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.dcm").write_bytes(b"no image")
    with pytest.raises(BadVolume, match=r"a\.dcm: is not a DICOM file"):
        open_image(str(tmp_path / "bad"))


def test_an_encoder_takes_a_folder_alone_and_as_a_channel(tmp_path: Path) -> None:
    folder, other = save_dicom(tmp_path / "a", scan()), save_dicom(tmp_path / "b", scan(1), series="1.2.4")
    encoder = load_encoder("demo", "cpu")
    assert encoder(str(folder), mode="resize", size=16).cls.equal(encoder(folder / "1.2.3-00.dcm", mode="resize", size=16).cls)
    found = encoder.load([folder, other])
    assert found.voxels.shape[0] == 2 and found.name == str(folder)
    assert np.array_equal(found.affine, load_scan([folder / "1.2.3-00.dcm", other / "1.2.4-00.dcm"]).affine)


def test_a_pretraining_list_names_a_folder_and_a_changed_slice_is_another_volume(tmp_path: Path) -> None:
    """As in the index, every file's name, size and time counts."""
    folder = save_dicom(tmp_path / "series", scan())
    (tmp_path / "list.json").write_text(json.dumps([{"image": "series", "shape": [14, 12, 10]}]))
    [entry] = read_datalist(tmp_path / "list.json").entries
    volume = load_volume(entry, 0, VolumeCache(tmp_path / "cache"))
    assert np.array_equal(volume.stored, load_volume(Entry(str(folder / "1.2.3-00.dcm"), ()), 0).stored)

    def key() -> str | None:
        return VolumeCache(tmp_path / "cache").key(entry, 0)

    keys = [key()]
    assert VolumeCache(tmp_path / "cache").load(entry, 0) is not None
    assert keys[0] == VolumeCache(tmp_path / "cache").key(Entry(str(folder / "1.2.3-00.dcm"), ()), 0)  # the same files
    middle = sorted(folder.iterdir())[4]
    os.utime(middle, (0, 0))
    keys.append(key())
    middle.rename(middle.with_name("renamed.dcm"))
    keys.append(key())
    (folder / "renamed.dcm").unlink()
    keys.append(key())
    assert None not in keys and len(set(keys)) == 4


def test_items_of_a_downstream_list_are_folders(tmp_path: Path) -> None:
    """From `dinov2 split` to prepared and cached cases, and a prediction on the series' own grid."""
    for i in range(3):
        save_dicom(tmp_path / "images" / f"case{i}", scan(i), series=f"1.2.{i}")
        label = nib.Nifti1Image(np.zeros((14, 12, 10), np.uint8), open_image(str(tmp_path / "images" / f"case{i}")).affine)
        (tmp_path / "labels").mkdir(exist_ok=True)
        nib.save(label, tmp_path / "labels" / f"case{i}.nii.gz")
    output = tmp_path / "BTCV_100_datalist.json"
    command = ["split", "--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels"), "--output", str(output)]
    assert main(command) == 0
    parts = read_downstream_datalist(tmp_path, BTCV)
    items = [item for split in SPLITS for item in parts[split]]
    assert {Path(item.images[0]) for item in items} == {tmp_path / "images" / item.case for item in items}
    check_headers(items, BTCV)
    case = prepare_case(items[0], BTCV)
    slice_item = Item((str(next(Path(items[0].images[0]).glob("*-00.dcm"))),), items[0].label, items[0].case)
    assert case.image.equal(prepare_case(slice_item, BTCV).image)
    cases = Cases(items[:1], BTCV, cache_dir=tmp_path / "cache")
    assert cases[0].image.equal(case.image) and cases._key(items[0], VolumeCache(tmp_path / "cache")) is not None
    assert len(list(VolumeCache(tmp_path / "cache").items())) == 1
    content = json.loads(output.read_text())
    content["test"][0]["image"] = "labels"
    output.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"test 0 .*no such file or DICOM folder .*labels"):
        read_downstream_datalist(tmp_path, BTCV)


def test_predict_takes_a_folder_as_a_case_as_a_channel_and_as_one_of_many_scans(tmp_path: Path) -> None:
    for i in range(4):
        save_dicom(tmp_path / "data" / f"p{i}", scan(i), series=f"1.2.{i}")
    folders, brats = [tmp_path / "data" / f"p{i}" for i in range(4)], load_recipe("BraTS")
    [(item, target)] = plan_jobs(folders[:1], tmp_path / "x.nii.gz", BTCV)
    assert (item.images, item.case, target.name) == ((str(folders[0]),), "p0", "x.nii.gz")
    [(item, _)] = plan_jobs(folders, tmp_path / "x.nii.gz", brats)
    assert item.images == tuple(map(str, folders))
    save_nifti(tmp_path / "data" / "q.nii.gz", scan())
    (tmp_path / "data" / "empty").mkdir()
    jobs = plan_jobs([tmp_path / "data"], tmp_path / "out", BTCV)
    assert [(item.images[0], target.name) for item, target in jobs] == [
        *((str(f), f"{f.name}.nii.gz") for f in folders), (str(tmp_path / "data" / "q.nii.gz"), "q.nii.gz"),
    ]  # fmt: skip
    assert [path.name for path in scans_in(tmp_path / "data")] == ["p0", "p1", "p2", "p3", "q.nii.gz"]
    with pytest.raises(BadInput, match="data: a folder without DICOM files is no case: .*needs a folder as --output"):
        plan_jobs([tmp_path / "data"], tmp_path / "x.nii.gz", BTCV)
    with pytest.raises(BadInput, match="none: no such file or DICOM folder"):
        plan_jobs([tmp_path / "none"], tmp_path / "x.nii.gz", BTCV)
