"""Any header is read or refused in a line, soon and in little memory."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from dinov2.data import Entry
from dinov2.data.volumes.opening import open_volume
from dinov2.errors import BadInput, BadVolume
from tests.fuzzing import SETTINGS, for_a_minute, works_or_is_refused
from tests.unit.data.corpus.test_index import compress_dicom, save_dicom

SHAPE = (6, 5, 4)
MOST_S, MOST_KIB = 5, 512 * 1024  # of processor time for a file, of memory beyond what the process had
HEADS = {
    ".nii": 352,
    ".hdr": 348,
    ".mgh": 284,
    ".nrrd": 400,
    ".mha": 400,
    ".dcm": 1200,
    ".RLE.dcm": 1200,
    ".JPEG.dcm": 1200,
}  # bytes with something to damage
LARGE = [-1, 0, 1, 2, 255, 2**15 - 1, 2**31 - 1, -(2**31), 2**63 - 1]
WORDS = [
    b"-1", b"0", b"1e999", b"nan", b"99999999999999999999", b"2147483648", b"LIST", b"raw", b"gzip", b"\n", b"\n\n", b" ", b"=",
    b":", b"..", b"/", b"%d", b"\x00", b"\xff", b"MET_DOUBLE", b"space", b"none", b"True",
]  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """By ending: the files of a small scan, the one that is damaged first."""
    folder = tmp_path_factory.mktemp("valid")
    voxels = np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / "a.nii")
    nib.save(nib.Nifti1Pair(voxels, np.eye(4)), folder / "b.img")
    nib.save(nib.MGHImage(voxels.astype(np.int32), np.eye(4)), folder / "c.mgh")
    for name in ("d.nrrd", "e.mha"):
        sitk.WriteImage(sitk.GetImageFromArray(voxels.T), folder / name)
    save_dicom(folder / "f", voxels)
    groups = [["a.nii"], ["b.hdr", "b.img"], ["c.mgh"], ["d.nrrd"], ["e.mha"]]
    found = {Path(names[0]).suffix: {name: (folder / name).read_bytes() for name in names} for names in groups}
    found[".dcm"] = {path.name: path.read_bytes() for path in sorted((folder / "f").iterdir())}
    for how in ("RLE", "JPEG"):
        series = save_dicom(folder / how, voxels)
        for path in series.iterdir():
            compress_dicom(path, how)
        found[f".{how}.dcm"] = {path.name: path.read_bytes() for path in sorted(series.iterdir())}
    return found


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[float, int, bytes]]:
    """Where (a share of the head), how many bytes go, what comes in their place; a last one may cut the file."""
    value = st.sampled_from(LARGE)
    integers = [
        st.tuples(value, st.sampled_from(["little", "big"])).map(lambda p, n=n: _bytes(p[0], n, p[1])) for n in (1, 2, 4, 8)
    ]
    floats = st.tuples(st.floats(width=32), st.sampled_from(["<f4", ">f4", "<f8"])).map(
        lambda p: np.array(p[0], p[1]).tobytes()
    )
    same = st.one_of(*integers, floats, st.binary(min_size=1, max_size=8))
    replaced = st.tuples(st.floats(0, 1), same).map(lambda p: (p[0], len(p[1]), p[1]))
    edited = st.tuples(st.floats(0, 1), st.integers(0, 6), st.sampled_from(WORDS) | st.binary(max_size=3))
    cut = st.tuples(st.floats(0, 1), st.just(10**6), st.just(b""))
    return draw(st.lists(replaced | replaced | edited, min_size=1, max_size=4)) + draw(
        st.just([]) | st.just([]) | st.lists(cut, max_size=1)
    )


def _bytes(value: int, size: int, order: str) -> bytes:
    return (value % 256**size).to_bytes(size, order)


@pytest.mark.slow
@pytest.mark.parametrize("ending", HEADS)
def test_any_header_is_read_or_refused_in_a_line(valid: dict[str, dict[str, bytes]], tmp_path: Path, ending: str) -> None:
    files = valid[ending]
    name = next(iter(files))
    for other, content in files.items():
        (tmp_path / other).write_bytes(content)
    path = tmp_path if ending.endswith(".dcm") else tmp_path / name

    def read() -> np.ndarray:
        return open_volume(Entry(str(path), SHAPE)).read()

    read()  # and with it the libraries

    @SETTINGS
    @given(damage=damages())
    def claim(damage: list[tuple[float, int, bytes]]) -> None:
        content = bytearray(files[name])
        for share, gone, bytes_instead in damage:
            place = int(share * min(HEADS[ending], len(content)))
            content[place : place + gone] = bytes_instead
        (tmp_path / name).write_bytes(content)
        begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = works_or_is_refused(read, BadVolume)
        assert time.process_time() - begun < MOST_S
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB
        assert isinstance(found, BadInput) or (found.ndim == 3 and found.dtype == np.float32)

    for_a_minute(claim, parts=len(HEADS))
