"""Where voxels lie comes from the affine alone, wherever it is asked for; headers that say otherwise are named or set aside.

Places are compared in world millimetres at all eight corners.
"""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from dinov2.data.cache.folder import VolumeCache
from dinov2.data.cache.store import load_volume
from dinov2.data.datalist import Entry, read_datalist
from dinov2.data.downstream.cases import check_headers, prepare_case, restore_prediction
from dinov2.data.downstream.lists import Item
from dinov2.data.downstream.recipes import Recipe
from dinov2.data.volumes import formats
from dinov2.data.volumes.grids import farthest_corner_mm
from dinov2.data.volumes.opening import as_whole, open_image, open_volume
from dinov2.errors import BadInput, BadVolume
from dinov2.features.scans import load_scan
from tests.unit.data.corpus.test_index import run, save_dicom, scan

SHAPE = (24, 20, 16)
SPACING = (1.5, 2.0, 3.0)
LABELS = Recipe(task="segmentation", classes={0: "background", 1: "one", 2: "two"})


def turned(degrees: float = 10, axis: str = "xyz", spacing: tuple[float, ...] = SPACING) -> np.ndarray:
    turn = Rotation.from_euler(axis, [degrees] * len(axis), degrees=True).as_matrix()
    return nib.affines.from_matvec(turn * spacing, [-30, 17, 5])


A = turned()


def voxels(seed: int = 0) -> np.ndarray:
    return scan(seed, SHAPE)


def save(path: Path, affine: np.ndarray = A, array: np.ndarray | None = None, codes: tuple[int, int] = (2, 0)) -> Path:
    """Of sform and qform, those whose code is not 0."""
    image = nib.Nifti1Image(voxels() if array is None else array, affine)
    image.set_qform(affine, codes[1])
    image.set_sform(affine if codes[0] else None, codes[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def patch(path: Path, place: int, content: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[place : place + len(content)] = content
    path.write_bytes(data)
    return path


def floats(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


def apart_mm(path: Path | str, expected: np.ndarray, shape: tuple[int, ...] = SHAPE) -> float:
    return farthest_corner_mm(shape, open_volume(Entry(str(path), ())).affine, expected)


def assert_everywhere(path: Path, affine: np.ndarray, tmp_path: Path, spacing: tuple[float, ...]) -> None:
    """The list's spacing, preprocessing's, the encoder's grid, a case's and its result's are the affine's."""
    assert apart_mm(path, affine) < 1e-3
    (tmp_path / "data").mkdir(exist_ok=True)
    for part in sorted(path.parent.glob(path.name.split(".")[0] + ".*")):
        shutil.copy(part, tmp_path / "data")
    [listed], _ = run(tmp_path / "data", tmp_path / "list.json")
    assert listed["spacing"] == pytest.approx(spacing, rel=1e-5)
    for entry in (Entry(str(path), ()), read_datalist(tmp_path / "list.json").entries[0]):
        volume = load_volume(entry, 0)
        assert sorted(volume.spacing_mm) == pytest.approx(sorted(spacing), rel=1e-5)
        found = load_scan([entry])
        order = [*(a for a in range(3) if a != volume.moved_axis), volume.moved_axis]
        wanted = affine[:, [*order, 3]]
        wanted[:3, 3] += wanted[:3, :3] @ [b.start for b in volume.box]
        assert farthest_corner_mm(found.voxels.shape[1:], found.affine, wanted) < 1e-3
    case = prepare_case(Item((str(path),), None, "a"), LABELS)
    assert sorted(case.spacing_mm) == pytest.approx(sorted(spacing), rel=1e-5)
    result = tmp_path / "result.nii.gz"
    nib.save(restore_prediction(case.image[0] * 0, case), result)
    raw = open_volume(Entry(str(result), ()))
    assert farthest_corner_mm(raw.image.shape, raw.affine, affine) < 1e-3 and not raw.notes


# ---------------------------------------------------------------------- NIfTI


@pytest.mark.parametrize("said", [(1, 1, 1), (2, 1.5, 3), (-1.5, 2, 3), (0, 2, 3), (np.inf, 2, 3), (1.5, np.nan, 3)])
def test_a_spacing_that_is_not_the_sforms_is_said_once_and_nowhere_taken(
    tmp_path: Path, said: tuple[float, ...], caplog: pytest.LogCaptureFixture
) -> None:
    path = patch(save(tmp_path / "a.nii"), 80, floats(*said))
    with caplog.at_level(logging.WARNING, "dinov2"):
        for _ in range(3):
            open_volume(Entry(str(path), ()))
    [record] = [r for r in caplog.records if r.name.startswith("dinov2")]
    assert str(path) in record.message and "sform's 1.5 x 2 x 3 mm" in record.message
    assert_everywhere(path, A, tmp_path, SPACING)
    [listed] = json.loads((tmp_path / "list.json").read_text())
    assert len(listed["header_notes"]) == 1 and "spacing is" in listed["header_notes"][0]


def test_a_header_that_agrees_with_itself_is_not_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i, codes in enumerate([(2, 0), (0, 1), (1, 1), (4, 1), (0, 0)]):
        path = save(tmp_path / f"{i}.nii", np.diag([-1.5, 2, 3, 1]), codes=codes)
        assert open_volume(Entry(str(path), ())).notes == ()
    assert not caplog.records


@pytest.mark.parametrize("unit, code, mm", [("micron", 3, 1e-3), ("meter", 1, 1e3), ("mm", 2, 1.0), ("unknown", 0, 1.0)])
@pytest.mark.parametrize("codes", [(1, 0), (0, 1)])
def test_units_are_applied(tmp_path: Path, unit: str, code: int, mm: float, codes: tuple[int, int]) -> None:
    in_units = np.diag([1 / mm, 1 / mm, 1 / mm, 1]) @ A
    path = save(tmp_path / "a.nii", in_units, codes=codes)
    patch(path, 123, bytes([code | 8]))
    assert nib.load(path).header.get_xyzt_units() == (unit, "sec")
    assert_everywhere(path, A, tmp_path, SPACING)


def test_ten_microns_are_not_ten_millimetres(tmp_path: Path) -> None:
    image = nib.Nifti1Image(voxels(), np.diag([10, 10, 10, 1]) @ A)
    image.header.set_xyzt_units("micron", "sec")
    nib.save(image, tmp_path / "a.nii.gz")
    assert open_volume(Entry(str(tmp_path / "a.nii.gz"), ())).spacing_mm == pytest.approx((0.015, 0.02, 0.03))


def test_an_empty_sform_is_none(tmp_path: Path) -> None:
    path = patch(save(tmp_path / "a.nii", codes=(1, 1)), 280, bytes(48))
    assert_everywhere(path, A, tmp_path, SPACING)
    alone = patch(patch(save(tmp_path / "b.nii", codes=(1, 0)), 280, bytes(48)), 80, floats(*SPACING))
    assert open_volume(Entry(str(alone), ())).spacing_mm == SPACING


@pytest.mark.parametrize("quaternion, degrees", [((1.0002, 0, 0), 180), ((0.70715, 0, 0.70715), None)])
def test_a_quaternion_a_hair_too_long_is_the_rotation_it_is_near(
    tmp_path: Path, quaternion: tuple[float, ...], degrees: int | None
) -> None:
    path = patch(save(tmp_path / "a.nii", codes=(0, 1)), 256, floats(*quaternion))
    bcd = np.array(quaternion) / np.linalg.norm(quaternion)
    expected = nib.affines.from_matvec(Rotation.from_quat([*bcd, 0]).as_matrix() * SPACING, A[:3, 3])
    assert degrees is None or np.allclose(expected[:3, :3], np.diag([1.5, -2, -3]))
    assert_everywhere(path, expected, tmp_path, SPACING)


@pytest.mark.parametrize(
    "codes, place, content, reason",
    [
        ((1, 0), 280, floats(np.nan), "geometry"),
        ((1, 1), 300, floats(np.inf), "geometry"),
        ((1, 0), 292, floats(np.nan), "geometry"),  # the place alone
        ((0, 1), 256, floats(np.nan, 0, 0), "geometry"),
        ((0, 1), 268, floats(np.nan), "geometry"),
        ((0, 1), 256, floats(1.01, 0, 0), "geometry"),
        ((0, 1), 80, floats(0), "spacing"),
        ((0, 1), 80, floats(-1.5), "spacing"),
        ((0, 0), 84, floats(np.nan), "spacing"),
        ((0, 0), 84, floats(-2), "spacing"),
        ((1, 0), 280, floats(0, 0, 0, 1, 0, 2, 0, 1, 0, 0, 3, 1), "spacing"),  # a column of zeros
        ((1, 0), 280, floats(1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0), "geometry"),  # two columns alike
    ],
)
def test_what_gives_voxels_no_place_is_set_aside_by_name_and_the_rest_goes_on(
    tmp_path: Path, codes: tuple[int, int], place: int, content: bytes, reason: str
) -> None:
    bad = patch(save(tmp_path / "data" / "bad.nii", codes=codes), place, content)
    save(tmp_path / "data" / "good.nii", array=voxels(1))
    listed, quarantine = run(tmp_path / "data", tmp_path / "list.json")
    assert [Path(e["image"]).name for e in listed] == ["good.nii"] and quarantine["bad.nii"][0] == reason
    assert "\n" not in quarantine["bad.nii"][1]
    for door in (lambda: load_scan([bad]), lambda: prepare_case(Item((str(bad),), None, "a"), LABELS)):
        with pytest.raises(BadVolume, match=r"bad\.nii: "):
            door()


def test_a_qform_of_the_same_space_or_mirrored_is_said_and_another_spaces_is_not(tmp_path: Path) -> None:
    def notes(sform_code: int, qform: np.ndarray) -> tuple[str, ...]:
        image = nib.Nifti1Image(voxels(), A)
        image.set_sform(A, sform_code)
        image.set_qform(qform, 1)
        nib.save(image, tmp_path / "a.nii")
        assert apart_mm(tmp_path / "a.nii", A) < 1e-3
        return open_volume(Entry(str(tmp_path / "a.nii"), ())).notes

    assert notes(1, A) == notes(4, turned(50)) == ()
    assert "from where its sform" in notes(1, turned(50))[0] and "mirrored" in notes(4, A @ np.diag([-1, 1, 1, 1]))[0]


def test_a_lists_spacing_does_not_move_a_file_that_has_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path / "a.nii")
    raw = open_volume(Entry(str(path), (), spacing_mm=(1, 1, 1)))
    assert raw.spacing_mm == pytest.approx(SPACING) and "the list's spacing is 1 x 1 x 1 mm" in caplog.text
    np.save(tmp_path / "a.npy", voxels())
    assert open_volume(Entry(str(tmp_path / "a.npy"), (), spacing_mm=SPACING)).spacing_mm == SPACING


@pytest.mark.parametrize(
    "name, encode",
    [
        ("a.nii", gzip.compress), ("a.nii.gz", lambda data: data), ("a.nii", bz2.compress), ("a.nii.bz2", gzip.compress),
        ("A.NII.GZ", lambda data: data),
    ],
)  # fmt: skip
def test_compression_is_told_by_the_first_bytes(tmp_path: Path, name: str, encode: Callable[[bytes], bytes]) -> None:
    plain = save(tmp_path / "plain" / "p.nii")
    path = tmp_path / name
    path.write_bytes(encode(plain.read_bytes()))
    image = open_image(str(path))
    assert np.array_equal(image.read(0), voxels()) and image.spacing == open_image(str(plain)).spacing
    case = prepare_case(Item((str(path),), None, "a"), LABELS)
    assert np.allclose(restore_prediction(case.image[0] * 0, case).affine, nib.load(plain).affine)


@pytest.mark.parametrize("name", ["a.mgh", "a.mgz"])
def test_a_freesurfer_files_compression_is_told_by_its_first_bytes(tmp_path: Path, name: str) -> None:
    other = tmp_path / ("b.mgz" if name == "a.mgh" else "b.mgh")
    nib.save(nib.MGHImage(voxels(), A), other)
    other.rename(tmp_path / name)
    raw = open_volume(Entry(str(tmp_path / name), ()))
    assert np.array_equal(raw.read(), voxels()) and farthest_corner_mm(SHAPE, raw.affine, A) < 1e-3


def test_an_analyze_header_without_a_spacing_is_not_of_one_millimetre(tmp_path: Path) -> None:
    image = nib.AnalyzeImage(voxels(), None)
    image.header.set_zooms(SPACING)
    nib.save(image, tmp_path / "a.hdr")
    assert open_volume(Entry(str(tmp_path / "a.hdr"), ())).spacing_mm == pytest.approx(SPACING)
    patch(tmp_path / "a.hdr", 80, floats(0))
    with pytest.raises(BadVolume, match=r"a\.hdr: spacing .* is not positive"):
        open_volume(Entry(str(tmp_path / "a.hdr"), ()))


# ---------------------------------------------------------------------- NRRD, MetaImage


def save_itk(path: Path, change: Callable[[str], str] = str) -> Path:
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels().T))
    lps = np.diag([-1, -1, 1, 1]) @ A
    image.SetSpacing(SPACING)
    image.SetDirection((lps[:3, :3] / SPACING).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path))
    path.write_text(change(path.read_text()))
    return path


@pytest.mark.parametrize(
    "name, words, mm",
    [
        ("a.nhdr", 'space units: "mm" "mm" "mm"', 1.0), ("a.nhdr", 'space units: "cm" "cm" "cm"', 10.0),
        ("a.nhdr", 'space units: "um" "um" "um"', 1e-3), ("a.nhdr", 'space units: "µm" "µm" "µm"', 1e-3),
        ("a.nhdr", 'space units: "m" "m" "m"', 1e3), ("a.nhdr", 'space units: "Meters" "Meters" "Meters"', 1e3),
        ("a.nhdr", 'space units: "microns" "microns" "microns"', 1e-3),
        ("a.mhd", "DistanceUnits = cm", 10.0), ("a.mhd", "DistanceUnits = um", 1e-3), ("a.mhd", "DistanceUnits = ?", 1.0),
    ],
)  # fmt: skip
def test_units_of_text_headers_are_applied(tmp_path: Path, name: str, words: str, mm: float) -> None:
    before = "endian:" if name.endswith("nhdr") else "ElementSpacing"
    path = save_itk(tmp_path / name, lambda text: text.replace(before, f"{words}\n{before}", 1))
    assert apart_mm(path, np.diag([mm, mm, mm, 1]) @ A) < 1e-3 * max(1, mm)
    assert open_volume(Entry(str(path), ())).spacing_mm == pytest.approx(tuple(mm * s for s in SPACING))


def without_space(text: str) -> str:
    """A NRRD header of plain spacings."""
    kept = [line for line in text.splitlines() if not line.startswith(("space:", "space origin:", "kinds:"))]
    return "\n".join(kept) + "\n"


def test_units_and_spacings_of_axes_are_applied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_itk(tmp_path / "a.nhdr", without_space)
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("space directions:")) + "\n"
    path.write_text(text.replace("endian:", 'spacings: 0.15 0.2 0.3\nunits: "cm" "cm" "cm"\nendian:'))
    assert open_volume(Entry(str(path), ())).spacing_mm == pytest.approx(SPACING) and not caplog.records
    path.write_text(text)
    assert open_volume(Entry(str(path), ())).spacing_mm == (1, 1, 1) and "no spacing: 1 mm is taken" in caplog.text


@pytest.mark.parametrize(
    "name, old, new, words",
    [
        ("a.nhdr", "endian:", 'space units: "furlong" "furlong" "furlong"\nendian:', "axes are in furlong"),
        ("a.nhdr", "endian:", 'space units: "mm" "mm" "cm"\nendian:', "axes are in cm, mm"),
        ("a.nhdr", "space directions:", "spacings: nan 1 1\n#", r"spacing \(nan, 1.0, 1.0\) is not positive"),
        ("a.nhdr", "space directions:", "spacings: 0 1 1\n#", "cannot be opened|is not positive"),
        ("a.mhd", "ElementSpacing = 1.5", "ElementSpacing = 0", r"spacing \(0.0, 2.0, 3.0\) is not positive"),
        ("a.mhd", "ElementSpacing = 1.5", "ElementSpacing = -1.5", "is not positive"),
        ("a.mhd", "TransformMatrix =", "TransformMatrix = nan 0 0 0 1 0 0 0 1\nComment =", "spacing|affine"),
        ("a.mhd", "TransformMatrix =", "TransformMatrix = 1 0 0 1 0 0 0 0 1\nComment =", "affine is singular"),
    ],
)
def test_text_headers_that_give_no_place_are_refused_by_name(tmp_path: Path, name: str, old: str, new: str, words: str) -> None:
    path = save_itk(tmp_path / name, without_space if "#" in new else str)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(BadVolume, match=words) as caught:
        open_volume(Entry(str(path), ()))
    assert name in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------- DICOM


def save_series(
    folder: Path,
    axes: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    change: Callable[[int, object], None] = lambda k, header: None,
    num_slices: int = 16,
) -> Path:
    """Slices of `voxels()` at (-30, -40, 100 + 3k), spacing 1.5 along x and 2 along y; each header may be changed."""
    pydicom = pytest.importorskip("pydicom")
    save_dicom(folder, voxels()[:, :, :num_slices])
    for k in range(num_slices):
        path = folder / f"1.2.3-{(7 * k) % 97:02d}.dcm"
        header = pydicom.dcmread(path)
        header.PixelSpacing, header.SliceThickness = [2, 1.5], 3
        header.ImageOrientationPatient, header.ImagePositionPatient = list(axes), [-30, -40, 100 + 3 * k]
        change(k, header)
        header.save_as(path)
    return folder


STRAIGHT = nib.affines.from_matvec(np.diag([-1.5, -2, 3]), [30, 40, 100])
EXPECTED = voxels() // 2 * 2  # of the series' slope


def first_file(folder: Path) -> str:
    return str(folder / "1.2.3-00.dcm")


def test_a_tilted_gantry_is_the_shear_it_is(tmp_path: Path) -> None:
    c, s = np.cos(np.deg2rad(15)), np.sin(np.deg2rad(15))
    folder = save_series(tmp_path / "series", (1, 0, 0, 0, c, -s))
    lps = nib.affines.from_matvec(np.stack([(1.5, 0, 0), (0, 2 * c, -2 * s), (0, 0, 3)], axis=1), [-30, -40, 100])
    ras = np.diag([-1, -1, 1, 1]) @ lps
    assert apart_mm(folder, ras) < 1e-6
    raw = open_volume(Entry(first_file(folder), ()))
    assert raw.spacing_mm == pytest.approx(SPACING) and np.array_equal(raw.read(), EXPECTED)
    assert np.allclose((raw.affine @ [0, 0, 15, 1])[:3], (30, 40, 145))
    [listed], _ = run(folder, tmp_path / "list.json")
    assert listed["spacing"] == pytest.approx(SPACING)
    case = prepare_case(Item((str(folder),), None, "a"), LABELS)
    assert farthest_corner_mm(SHAPE, restore_prediction(case.image[0] * 0, case).affine, ras) < 1e-3


def move(k: int, **keys: object) -> Callable[[int, object], None]:
    """A change of the slices from k on, or of slice k alone where it is negative."""

    def change(at: int, header: object) -> None:
        if at == -k or (k >= 0 and at >= k):
            for name, value in keys.items():
                setattr(header, name, value)

    return change


def shift(at: int, dx: float, dz: float = 0.0, from_there: bool = False) -> Callable[[int, object], None]:
    def change(k: int, header: object) -> None:
        if k == at or (from_there and k > at):
            x, y, z = header.ImagePositionPatient
            header.ImagePositionPatient = [x + dx, y, z + dz]

    return change


def stretch(k: int, header: object) -> None:
    """Distances that are each within the tolerance, and end far from a straight line at even ones."""
    x, y, _ = header.ImagePositionPatient
    header.ImagePositionPatient = [x, y, 100 + 3 * k + 0.25 * max(0, k - 8)]


@pytest.mark.parametrize(
    "change, reason",
    [
        (shift(7, 4.0), "mixed_slices"), (shift(0, 1.5), "mixed_slices"), (shift(15, 1.5), "mixed_slices"),
        (shift(8, 3.0, from_there=True), "mixed_slices"), (stretch, "missing_slices"),
        (move(-5, ImageOrientationPatient=[1, 0, 0]), "geometry"),
        (move(-5, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "geometry"),
        (move(0, ImageOrientationPatient=[2, 0, 0, 0, 1, 0]), "geometry"),
        (move(-5, PixelSpacing=[2, 0]), "spacing"),
    ],
)  # fmt: skip
def test_slices_off_a_straight_line_or_without_directions_are_refused_by_name(
    tmp_path: Path, change: Callable[[int, object], None], reason: str
) -> None:
    folder = save_series(tmp_path / "series", change=change)
    with pytest.raises(BadVolume) as caught:
        open_image(str(folder))
    assert caught.value.reason == reason and "\n" not in str(caught.value)
    listed, quarantine = run(folder, tmp_path / "list.json")
    assert not listed and [r for r, _ in quarantine.values()] == [reason]


def test_a_direction_a_hair_off_is_of_length_one(tmp_path: Path) -> None:
    assert apart_mm(save_series(tmp_path, (1.0002, 0, 0, 0, 0.9998, 0)), STRAIGHT) < 1e-6


def thickness_of_some(k: int, header: object) -> None:
    if k == 3:
        del header.SliceThickness
    elif k >= 8:
        header.SliceThickness = 5


def test_the_thickness_counts_for_a_single_slice_alone(tmp_path: Path) -> None:
    folder = save_series(tmp_path / "series", change=thickness_of_some)
    assert apart_mm(folder, STRAIGHT) < 1e-6
    single = save_series(tmp_path / "single", num_slices=1)
    assert open_image(str(single)).spacing == pytest.approx(SPACING)
    nothing = save_series(tmp_path / "nothing", num_slices=1, change=move(0, SliceThickness=None))
    with pytest.raises(BadVolume, match="single slice without a thickness"):
        open_image(str(nothing))


def test_a_slice_without_a_place_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the end of a series nothing else shows it."""
    folder = save_series(tmp_path / "series", change=move(-15, ImagePositionPatient=None))
    for path in (str(folder), first_file(folder)):
        assert open_volume(Entry(path, ())).image.shape == (24, 20, 15)
        assert "1 DICOM files beside it are left out, 1.2.3-08.dcm" in caplog.text
        caplog.clear()
    _, quarantine = run(folder, tmp_path / "list.json")
    assert quarantine["1.2.3-08.dcm"][0] == "not_an_image"


def test_a_copied_slice_counts_once(tmp_path: Path) -> None:
    folder = save_series(tmp_path / "series")
    for path in sorted(folder.iterdir())[3:6]:
        shutil.copy(path, path.with_name(f"{path.stem} (1).dcm"))
    for path in (folder, sorted(folder.iterdir())[3]):
        raw = open_volume(Entry(str(path), ()))
        assert raw.image.shape == SHAPE and np.array_equal(raw.read(), EXPECTED)
    [listed], quarantine = run(folder, tmp_path / "list.json")
    assert listed["shape"] == [*SHAPE] and not quarantine


def test_two_pictures_of_one_name_and_place_are_not_copies(tmp_path: Path) -> None:
    folder = save_series(tmp_path / "series")
    path = sorted(folder.iterdir())[3]
    path.with_name("other.dcm").write_bytes(path.read_bytes()[:-2] + b"\x07\x07")
    with pytest.raises(BadVolume, match="1 slices at the place of another"):
        open_image(str(folder))
    for one in folder.iterdir():  # every slice under one name, as careless anonymisers write them
        if one.name == "other.dcm":
            one.unlink()
    folder = save_series(tmp_path / "same", change=move(0, SOPInstanceUID="1.2"))
    assert open_image(str(folder)).shape == SHAPE


@pytest.mark.parametrize("at", [0, 9])
def test_a_lone_localizer_is_named(tmp_path: Path, at: int) -> None:
    sideways = move(-at, ImageOrientationPatient=[0, 1, 0, 0, 0, -1]) if at else None

    def first_alone(k: int, header: object) -> None:
        if k == 0:
            header.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]

    folder = save_series(tmp_path / "series", change=sideways or first_alone)
    name = f"1.2.3-{7 * at % 97:02d}.dcm"
    with pytest.raises(BadVolume, match=rf"1 of 16 differ from the rest \({name}\)") as caught:
        open_image(str(folder))
    assert caught.value.reason == "mixed_slices"


@pytest.mark.parametrize("kind", ["bare implicit", "bare explicit", "no meta", "no preamble", "deflated"])
@pytest.mark.parametrize(("ending", "photometric"), [(".dcm", "MONOCHROME2"), ("", "MONOCHROME1")])
def test_files_without_preamble_and_deflated_ones_are_read(tmp_path: Path, kind: str, ending: str, photometric: str) -> None:
    pydicom = pytest.importorskip("pydicom")
    folder = save_series(tmp_path / "series", change=move(0, PhotometricInterpretation=photometric))
    for path in sorted(folder.iterdir()):
        header = pydicom.dcmread(path)
        data = path.read_bytes()
        path.unlink()
        target = path.with_suffix(ending)
        if kind == "no preamble":
            target.write_bytes(data[132:])
        elif kind == "deflated":
            header.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
            header.save_as(target)
        else:
            del header.file_meta
            header.preamble = bytes(128) if kind == "no meta" else None
            implicit = kind != "bare explicit"
            header.save_as(target, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    raw = open_volume(Entry(str(folder), ()))
    assert np.array_equal(raw.read(), EXPECTED) and farthest_corner_mm(SHAPE, raw.affine, STRAIGHT) < 1e-6
    [listed], quarantine = run(folder, tmp_path / "list.json")
    assert listed["shape"] == [*SHAPE] and not quarantine


def test_a_deflated_slice_may_be_smaller_than_its_voxels(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    save_dicom(tmp_path, np.zeros((80, 80, 1), np.int16))
    [path] = tmp_path.iterdir()
    header = pydicom.dcmread(path)
    header.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    header.save_as(path)
    assert path.stat().st_size < 80 * 80 * 2
    assert (open_image(str(path)).read(0) == 0).all()


def test_a_deflated_slice_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pydicom = pytest.importorskip("pydicom")
    folder = save_series(tmp_path / "series", num_slices=1)
    [path] = folder.iterdir()
    header = pydicom.dcmread(path)
    header.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    header.ImageComments = "x" * 4000
    header.save_as(path)
    monkeypatch.setattr("dinov2.data.volumes.dicom._MAX_INFLATED", 3000)
    with pytest.raises(BadVolume, match="expand to more than the 3,000 bytes"):
        open_image(str(path))


def test_files_that_begin_like_a_tag_by_chance_are_no_slices(tmp_path: Path) -> None:
    for i, start in enumerate([b"\x08\x00", b"\x08\x00\x00\x01\x04\x00\x00\x00", b"\x08\x00\x05\x00\xff\xff\x00\x00", b""]):
        (tmp_path / f"{i}").write_bytes(start.ljust(8, b"\x09") if i else start)
        assert not formats.is_dicom(tmp_path / f"{i}"), i


# ---------------------------------------------------------------------- label maps and grids


def label() -> np.ndarray:
    array = np.zeros(SHAPE, np.int16)
    array[4:12, 5:15, 3:9] = 1
    array[8:11, 7:12, 4:8] = 2
    return array


@pytest.mark.parametrize("stored", [np.uint8, np.int8, np.int16, np.uint16, np.int32])
@pytest.mark.parametrize("ending", [".nii.gz", ".hdr"])
def test_labels_are_whole_numbers_whatever_slope_stored_them(tmp_path: Path, stored: type, ending: str) -> None:
    """nibabel#1069: floats under an integer header come back scaled."""
    image = save(tmp_path / "image.nii.gz")
    path = tmp_path / "data" / f"x{ending}"
    path.parent.mkdir()
    one = (nib.Nifti1Pair if ending == ".hdr" else nib.Nifti1Image)(label().astype(float), A)
    one.set_data_dtype(stored)
    nib.save(one, path)
    case = prepare_case(Item((str(image),), str(path), "a"), LABELS)
    assert np.array_equal(case.grid.restore(case.truth[0].numpy()), label())
    [listed], _ = run(path.parent, tmp_path / "list.json")
    assert listed["label_map"] is True


def test_scans_of_a_slope_are_not_taken_for_label_maps(tmp_path: Path) -> None:
    image = nib.Nifti1Image((np.arange(np.prod(SHAPE)).reshape(SHAPE) % 40).astype(np.uint8), A)
    image.header.set_slope_inter(0.5, 0)
    nib.save(image, tmp_path / "data.nii")
    (tmp_path / "data").mkdir()
    (tmp_path / "data.nii").rename(tmp_path / "data" / "a.nii")
    [listed], _ = run(tmp_path / "data", tmp_path / "list.json")
    assert "label_map" not in listed


def test_numbers_are_whole_within_the_storages_rounding_and_no_further() -> None:
    values = np.array([-1e-8, 0.99607849, 1.5, 2.0000001, 3.004], np.float32)
    assert as_whole(values, 2 / 255).tolist() == [0, 1, 1.5, 2, values[4]]
    assert as_whole(values, 0.0).tolist() == [values[0], values[1], 1.5, 2, values[4]]
    assert as_whole(np.array([1.0, 1.5, 3.0], np.float32), 1.5).tolist() == [1.0, 1.5, 3.0]


def test_a_refused_labels_digits_are_shown(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz")
    path = save(tmp_path / "label.nii.gz", array=(label() * np.float32(0.99607849)).astype(np.float32))
    with pytest.raises(BadInput, match=r"label values 0\.996078491, 1\.99215698 are not among"):
        prepare_case(Item((str(image),), str(path), "a"), LABELS)


@pytest.mark.parametrize("degrees", [45, 135, -45, 30])
@pytest.mark.parametrize("axis", ["x", "y", "z", "xyz"])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
def test_image_by_sform_and_label_by_qform_fit_at_any_angle(
    tmp_path: Path, degrees: float, axis: str, flips: tuple[int, ...]
) -> None:
    affine = turned(degrees, axis) @ np.diag([*flips, 1])
    image = save(tmp_path / "image.nii.gz", affine)
    path = save(tmp_path / "label.nii.gz", affine, label(), codes=(0, 1))
    item = Item((str(image),), str(path), "a")
    check_headers([item], LABELS)
    case = prepare_case(item, LABELS)
    assert np.array_equal(case.grid.restore(case.truth[0].numpy()), label())
    assert farthest_corner_mm(SHAPE, restore_prediction(case.truth, case).affine, affine) < 1e-3


def test_orientations_that_differ_by_places_are_refused(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz")
    path = save(tmp_path / "label.nii.gz", A @ np.diag([-1, 1, 1, 1]), label())
    with pytest.raises(BadInput, match="orientations are"):
        check_headers([Item((str(image),), str(path), "a")], LABELS)


# ---------------------------------------------------------------------- nothing stale


def test_what_was_read_otherwise_is_not_served_from_cache_or_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = Entry(str(save(tmp_path / "data" / "a.nii")), ())
    with monkeypatch.context() as earlier:
        earlier.setattr("dinov2.data.cache.folder.READING", formats.READING - 1)
        earlier.setattr("dinov2.data.corpus.index.walk.READING", formats.READING - 1)
        load_volume(entry, 0, VolumeCache(tmp_path / "cache"))
        run(tmp_path / "data", tmp_path / "list.json")
    assert VolumeCache(tmp_path / "cache").load(entry, 0) is None
    run(tmp_path / "data", tmp_path / "list.json")
    assert capsys.readouterr().out.count("; 1 new or changed") == 2
