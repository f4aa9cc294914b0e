"""What a volume's values are: stored x slope + intercept, and what was not measured takes no part in anything."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dinov2.data.cache.store import load_volume
from dinov2.data.corpus.index.examine import describe_voxels
from dinov2.data.datalist import Entry
from dinov2.data.downstream.cases import prepare_case
from dinov2.data.downstream.lists import Item
from dinov2.data.downstream.recipes import load_recipe
from dinov2.data.preprocess import far_plateau, intensity_range, normalise, settle
from dinov2.data.volumes.opening import open_volume
from dinov2.errors import BadVolume
from dinov2.features.scans import load_scan
from tests.unit.data.corpus.test_index import compress_dicom, run, save_dicom, save_itk, scan

SHAPE = (48, 44, 12)


def ct(padding: float | None) -> np.ndarray:
    """Air, soft tissue and bone in a round field of view; outside it, where nothing was measured, `padding`."""
    rng = np.random.default_rng(3)
    x, y = np.meshgrid(np.linspace(-1, 1, SHAPE[0]), np.linspace(-1, 1, SHAPE[1]), indexing="ij")
    radius = np.hypot(x, y)[..., None] * np.ones(SHAPE)
    voxels = np.where(radius < 0.7, rng.normal(40, 60, SHAPE), rng.normal(-1000, 10, SHAPE))
    voxels = np.where(radius < 0.1, rng.normal(1000, 150, SHAPE), voxels).round()
    return voxels if padding is None else np.where(radius > 1, padding, voxels)


def contrast(voxels: np.ndarray) -> float:
    """What 300 HU are of the range of 2 after preprocessing; from two places whose values are known."""
    mapped = normalise(voxels.astype(np.float32), "ct")
    stored = voxels[20:30, 8:12, :]
    slope = np.polyfit(stored.ravel(), mapped[20:30, 8:12, :].ravel(), 1)[0]
    return 300 * slope


@pytest.mark.parametrize("padding", [-32768, -10000, np.finfo(np.float32).min, np.finfo(np.float64).min])
def test_a_far_plateau_outside_the_field_of_view_takes_no_contrast(tmp_path: Path, padding: float) -> None:
    whole = contrast(ct(None))
    assert 0.2 < whole < 0.3
    with np.errstate(over="ignore"):
        nib.save(nib.Nifti1Image(ct(padding), np.eye(4)), tmp_path / "ct.nii.gz")
    raw = open_volume(Entry(str(tmp_path / "ct.nii.gz"), ()))
    voxels = raw.read()
    assert contrast(voxels) == pytest.approx(whole, rel=0.02)
    facts, non_finite = describe_voxels(raw)
    outside = ct(padding) == padding
    assert non_finite == 0 and facts["padding"] == pytest.approx(outside.mean(), rel=1e-3)
    assert facts["percentiles"][0] > -1100
    assert (normalise(voxels, "ct")[outside] == -1).all()


def test_padding_that_is_not_a_number_of_the_scan_leaves_no_trace_in_what_fills_non_finite_voxels() -> None:
    voxels = ct(-32768).astype(np.float32)
    voxels[24, 22, 6] = np.nan
    assert normalise(voxels, "ct")[24, 22, 6] > -0.6  # about the mean of the scan, not of the padding


def test_percentiles_are_those_of_what_was_measured_however_little_that_is(tmp_path: Path) -> None:
    voxels = np.full((40, 40, 40), -32768, np.float32)
    inner = np.random.default_rng(1).normal(0, 300, (16, 16, 16)).round()
    voxels[12:28, 12:28, 12:28] = inner
    settled, padding = settle(voxels, "a")
    assert padding is not None and padding.sum() == 40**3 - 16**3
    assert intensity_range(settled, "a", padding=padding) == pytest.approx(np.percentile(inner, (0.05, 99.95)))
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii")
    image = prepare_case(Item((str(tmp_path / "a.nii"),), None, "a"), load_recipe("MSD-Hippocampus")).image
    assert 1 <= int((image > 0.9999).sum()) < 20  # a 2000th of 4096, not of 64,000


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal(500, 200, 9000).clip(0, None),  # many zeros
        np.append(np.zeros(4000), np.random.default_rng(0).normal(1000, 9, 9000)),  # masked
        np.repeat([-200, 0, 1], 3000).astype(float),  # labels
        np.append(np.random.default_rng(0).normal(0, 1, 9000), -1e6),  # one voxel, which the percentile leaves out
        np.append(np.full(99999, -1e7), np.arange(70.0)),  # next to nothing but the plateau
        np.full(1000, -7.0),
    ],
)
def test_a_lowest_value_that_is_one_of_the_scans_is_no_padding(values: np.ndarray) -> None:
    assert far_plateau(values) is None


def test_padding_is_left_out_by_training_encoder_index_and_cases_alike(tmp_path: Path) -> None:
    for name, padding in (("padded", -32768), ("plain", None)):
        nib.save(nib.Nifti1Image(ct(padding).astype(np.int16), np.diag([1.5, 1.5, 3, 1])), tmp_path / f"{name}.nii.gz")
    padded, plain = (str(tmp_path / f"{n}.nii.gz") for n in ("padded", "plain"))
    spread = {}
    for path in (padded, plain):
        inner = np.s_[..., 20:26, 18:24, 4:8]
        case = prepare_case(Item((path,), None, "a"), load_recipe("ICBM"))
        spread[path] = [
            float(v.std()) for v in (load_volume(Entry(path, SHAPE), 0).data[inner], load_scan([path]).data[inner], case.image)
        ]
    assert spread[padded] == pytest.approx(spread[plain], rel=0.1)
    listed, _ = run(tmp_path, tmp_path / "list.json")
    assert {Path(e["image"]).name: "padding" in e for e in listed} == {"padded.nii.gz": True, "plain.nii.gz": False}


def test_a_metaimages_slope_and_offset_count(tmp_path: Path) -> None:
    path = save_itk(tmp_path / "a.mha", scan())
    scale = b"ElementToIntensityFunctionSlope = 2\nElementToIntensityFunctionOffset = -5\nElementType"
    path.write_bytes(path.read_bytes().replace(b"ElementType", scale))
    assert np.array_equal(open_volume(Entry(str(path), ())).read(), scan() * 2.0 - 5)
    path.write_bytes(path.read_bytes().replace(b"Slope = 2", b"Slope = 0"))
    with pytest.raises(BadVolume, match="gives no values"):
        open_volume(Entry(str(path), ()))


# ---------------------------------------------------------------------- DICOM


def change(folder: Path, **tags: object) -> None:
    """Set tags of every slice; None removes one."""
    pydicom = pytest.importorskip("pydicom")
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        for name, value in tags.items():
            if value is None:
                delattr(header, name)
            elif name.startswith("PixelPadding"):
                header.add_new(name, "SS", value)
            else:
                setattr(header, name, value)
        header.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize(
    ("bits", "is_signed", "how"),
    [(*kind, how) for kind in ((16, 1), (16, 0), (12, 0), (12, 1), (8, 0)) for how in ("native", "RLE")]
    + [(*kind, how) for kind in ((16, 1), (16, 0), (8, 0)) for how in ("JPEG", "JPEG2000")]
    + [(12, 0, "shifted"), (12, 1, "shifted")],
)
def test_values_are_stored_ones_scaled_however_they_are_to_be_shown(
    tmp_path: Path, bits: int, is_signed: int, how: str
) -> None:
    pydicom = pytest.importorskip("pydicom")
    allocated = 8 if bits == 8 else 16
    rng = np.random.default_rng(0)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)
    stored = rng.integers(low, high + 1, (14, 12, 10))
    stored[0, 0, :], stored[1, 0, :] = low, high
    if how == "JPEG2000":  # ITK writes beyond its memory where that makes a picture larger; it reads them
        stored = np.sort(stored, axis=None).reshape(10, 12, 14).T
    shift = allocated - bits if how == "shifted" else 0
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        folder = save_dicom(tmp_path / photometric, scan())
        for path in folder.iterdir():
            header = pydicom.dcmread(path)
            k = round((float(header.ImagePositionPatient[2]) + 30) / 3)
            header.BitsAllocated, header.BitsStored, header.HighBit = allocated, bits, bits - 1 + shift
            header.PixelRepresentation, header.PhotometricInterpretation = is_signed, photometric
            kind = f"{'i' if is_signed else 'u'}{allocated // 8}"
            header.PixelData = (stored[:, :, k].T << shift).astype(kind).tobytes()
            header.save_as(path, enforce_file_format=True)
            if how not in ("native", "shifted"):
                compress_dicom(path, how)
        found = open_volume(Entry(str(folder), ())).read()
        np.testing.assert_array_equal(found, stored * 2.0 - 1024, err_msg=photometric)


def test_a_palette_a_table_of_values_and_a_slope_of_none_are_refused_by_name(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    table = pydicom.Sequence([pydicom.Dataset()])
    for tags, words in (
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour"),
        ({"ModalityLUTSequence": table, "RescaleSlope": None, "RescaleIntercept": None}, "ModalityLUTSequence"),
        ({"RescaleSlope": 0}, "RescaleSlope"),
    ):
        folder = save_dicom(tmp_path / words, scan())
        change(folder, **tags)
        with pytest.raises(BadVolume, match=words):
            open_volume(Entry(str(folder), ()))


@pytest.mark.parametrize("limit", [None, 40])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_dicoms_padding_tag_is_honoured_even_near_the_values(tmp_path: Path, limit: int | None, photometric: str) -> None:
    voxels = scan()
    padded = np.zeros(voxels.shape, bool)
    padded[:4] = True
    voxels[padded] = 36 * 2 - 1024 if limit else 30 * 2 - 1024  # stored 36, or 30
    folder = save_dicom(tmp_path / "series", voxels)
    change(
        folder,
        PixelPaddingValue=30,
        PhotometricInterpretation=photometric,
        **({"PixelPaddingRangeLimit": limit} if limit else {}),
    )
    raw = open_volume(Entry(str(folder), ()))
    found = raw.read()
    assert np.array_equal(raw.padding(found), padded) and set(found[padded]) == set(voxels[padded].astype(np.float32))
    facts, _ = describe_voxels(raw)
    assert facts["padding"] == pytest.approx(4 / 14, rel=1e-3)
    assert facts["percentiles"][0] >= voxels[~padded].min() - 2
    assert load_volume(Entry(str(folder), voxels.shape), 0).data.min() == -1
    assert (normalise(found, "a", padding=padded)[padded] == -1).all()
