"""Damaged, endless and foreign files: each is named, nothing waits, memory stays bounded, and the rest goes on."""

from __future__ import annotations

import errno
import gzip
import json
import os
import socket
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dinov2.cli import main
from dinov2.data.cache.commands import build
from dinov2.data.corpus.index import command as index_command
from dinov2.data.datalist import Entry, read_datalist, write_datalist
from dinov2.data.volumes import bounded
from dinov2.data.volumes.bounded import check_expansion, expanded
from dinov2.data.volumes.formats import scans_in
from dinov2.data.volumes.opening import open_volume
from dinov2.errors import BadInput, BadVolume
from tests.unit.data.corpus.deadly import examine_with_a_fault
from tests.unit.data.corpus.test_index import SPACING, compress_dicom, run, save_dicom, save_itk, save_nifti, scan

# ---------------------------------------------------------------------- flipped bits


def save_as(path: Path, ending: str) -> Path:
    path = path.with_name(f"a{ending}")
    if ending in (".nrrd", ".mha"):
        return save_itk(path, scan(), compress=True)
    if ending == ".npz":
        np.savez_compressed(path, scan())
    elif ending == ".mgz":
        nib.save(nib.MGHImage(scan(), np.diag([*SPACING, 1.0])), path)
    elif ending == ".4d.nii.gz":
        nib.save(nib.Nifti1Image(np.stack([scan(0), scan(1)], axis=3), np.diag([*SPACING, 1.0])), path)
    else:
        nib.save((nib.Nifti1Pair if ".img" in ending else nib.Nifti1Image)(scan(), np.diag([*SPACING, 1.0])), path)
    return path


def content(path: Path) -> tuple[np.ndarray, tuple, tuple, object]:
    raw = open_volume(Entry(str(path), (), spacing_mm=SPACING if path.suffix == ".npz" else None, axes="xyzt"))
    voxels = np.stack([raw.read(t) for t in range(raw.num_times)])
    return voxels, raw.image.shape, raw.spacing_mm, raw.affine.tolist()


@pytest.mark.parametrize("ending", [".nii.gz", ".nii.bz2", ".mgz", ".img.gz", ".4d.nii.gz", ".nrrd", ".mha", ".npz"])
def test_a_flipped_bit_is_named_or_changes_nothing(tmp_path: Path, ending: str) -> None:
    path = save_as(tmp_path / "a", ending)
    whole = path.read_bytes()
    good = content(path)
    start = {".nrrd": whole.find(b"\n\n") + 2, ".mha": whole.find(b"LOCAL\n") + 6}.get(ending, 0)  # text says what it says
    rng = np.random.default_rng(0)
    refused, checksums = 0, 0
    for bit in rng.choice(8 * (len(whole) - start), 300 if ending == ".nii.gz" else 80, replace=False):
        flipped = bytearray(whole)
        flipped[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            voxels, *header = content(path)
        except BadVolume as err:
            refused += 1
            checksums += "damaged: its gzip checksum does not match" in str(err)
            assert str(path) in str(err) and "\n" not in str(err)
            continue
        np.testing.assert_array_equal(voxels, good[0], err_msg=str(bit))
        assert header == list(good[1:]), bit
    assert refused > 70 and (checksums > 40 or ending in (".nii.bz2", ".npz")), (refused, checksums)


def test_the_checksum_of_the_other_half_of_a_pair_counts_too(tmp_path: Path) -> None:
    image = nib.Nifti1Pair(scan(), np.diag([*SPACING, 1.0]))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", os.urandom(30_000)))
    nib.save(image, tmp_path / "a.img.gz")
    header = tmp_path / "a.hdr.gz"
    packed = bytearray(header.read_bytes())
    packed[-8] ^= 1
    header.write_bytes(packed)
    with pytest.raises(BadVolume, match=r"a\.(hdr|img)\.gz: damaged: its gzip checksum"):
        content(tmp_path / "a.img.gz")


@pytest.mark.parametrize("name", ["a.nii", "a.mgh"])
def test_the_checksum_counts_whatever_the_files_ending(tmp_path: Path, name: str) -> None:
    packed = bytearray(save_as(tmp_path / "a", {"a.nii": ".nii.gz", "a.mgh": ".mgz"}[name]).read_bytes())
    (tmp_path / name).write_bytes(packed)
    assert np.array_equal(content(tmp_path / name)[0][0], scan())
    packed[-8] ^= 1
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(BadVolume, match=rf"{name}: damaged: its gzip checksum"):
        content(tmp_path / name)


def test_members_padding_and_what_follows_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    halves = os.urandom(3_000_000), bytes(100)
    packed = [gzip.compress(h, 1) for h in halves]
    for tail in (b"", bytes(2_000_000), b"no gzip"):
        path.write_bytes(packed[0] + bytes(7) + packed[1] + tail)
        assert b"".join(expanded(path, 3_000_100)) == b"".join(halves)
    with pytest.raises(BadVolume, match="more than the 3,000,099 bytes"):
        check_expansion(path, 3_000_099)
    for cut in (1, 5, len(packed[1]) - 3):
        path.write_bytes((packed[0] + packed[1])[:-cut])
        with pytest.raises(BadVolume, match=r"truncated|damaged"):
            check_expansion(path, 3_000_100)


# ---------------------------------------------------------------------- bombs


def bombs(folder: Path) -> dict[str, str]:
    """Files of kilobytes that expand to 60 MB: name -> what their row says."""
    zeros = bytes(2**20)

    def packed(first: bytes, window: int = 31) -> bytes:
        stream = zlib.compressobj(1, zlib.DEFLATED, window)
        return b"".join([stream.compress(first), *(stream.compress(zeros) for _ in range(60)), stream.flush()])

    header = nib.Nifti1Header()
    header.set_data_shape((20, 20, 20))
    (folder / "zeros.nii.gz").write_bytes(packed(b""))
    (folder / "more.nii.gz").write_bytes(packed(header.binaryblock))
    header["vox_offset"] = 50e6
    (folder / "late.nii.gz").write_bytes(
        packed(header.binaryblock + bytes([1, 0, 0, 0]) + (50_000_000 - 352).to_bytes(4, "little"))
    )
    (folder / "more.mgz").write_bytes(packed(nib.MGHImage(np.zeros((20, 20, 20), np.int16), np.eye(4)).header.binaryblock))
    text = "NRRD0004\ntype: short\ndimension: 3\nsizes: 20 20 20\nspacings: 1 1 1\nencoding: gzip\nendian: little\n\n"
    (folder / "more.nrrd").write_bytes(text.encode() + packed(b""))
    text = (
        "ObjectType = Image\nNDims = 3\nDimSize = 20 20 20\nElementType = MET_SHORT\nCompressedData = True\n"
        "ElementDataFile = LOCAL\n"
    )
    (folder / "more.mha").write_bytes(text.encode() + packed(b"", 15))
    save_dicom(folder / "series", scan(1))
    plain = (folder / "series" / "1.2.3-00.dcm").read_bytes()
    meta = plain[: 144 + int.from_bytes(plain[140:144], "little")]
    deflated = meta.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    deflated = deflated.replace(b"UI\x14\x001.2.840.10008.1.2.1.99", b"UI\x16\x001.2.840.10008.1.2.1.99")
    deflated = deflated[:140] + (len(deflated) - 144).to_bytes(4, "little") + deflated[144:]
    (folder / "more.dcm").write_bytes(deflated + packed(plain[len(meta) :], -15))
    return {
        "zeros.nii.gz": "cannot be opened", "more.nii.gz": "expand to more", "late.nii.gz": "before the voxels",
        "more.mgz": "expand to more", "more.nrrd": "expand to more", "more.mha": "expand to more", "more.dcm": "expand to more",
    }  # fmt: skip


def test_no_stream_is_expanded_further_than_its_header_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    expected = bombs(data)
    inflated = 0
    pieces = bounded._pieces

    def counted(*args: object) -> object:
        nonlocal inflated
        for piece in pieces(*args):
            inflated += len(piece)
            yield piece

    monkeypatch.setattr(bounded, "_pieces", counted)
    monkeypatch.setattr("dinov2.data.volumes.dicom._MAX_INFLATED", 20 * 2**20)
    listed, quarantine = run(data, tmp_path / "list.json")
    assert [Path(e["image"]).name for e in listed] == ["1.2.3-00.dcm"]
    assert {n: words in quarantine[n][1] for n, words in expected.items()} == dict.fromkeys(expected, True), quarantine
    assert inflated < 120 * 2**20


def test_a_deflated_slice_says_from_where_it_is(tmp_path: Path) -> None:
    """pydicom would expand it all the same, to whatever size."""
    data = tmp_path / "data"
    data.mkdir()
    bombs(data)
    packed = (data / "more.dcm").read_bytes()
    path = tmp_path / "a.dcm"
    path.write_bytes(packed[:132] + packed[144:])  # without the length of the first group
    with pytest.raises(BadVolume, match="does not say from where"):
        open_volume(Entry(str(path), ()))


# ---------------------------------------------------------------------- what is no file


def make_special(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        cwd = Path.cwd()
        os.chdir(path.parent)  # the name of a socket is short
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
        os.chdir(cwd)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_only_regular_files_are_opened_and_the_others_are_named(tmp_path: Path, kind: str) -> None:
    data = tmp_path / "data"
    save_nifti(data / "good.nii.gz", scan())
    save_dicom(data / "series", scan(1))
    for name in ("a.nii", "b.nii.gz", "c.nrrd", "d.mha", "e.npy", "f.npz", "g.mgz", "series/h.dcm", "series/i", "j.hdr"):
        make_special(data / name, kind)
    for name, text in (
        ("k.nhdr", "NRRD0004\ntype: short\ndimension: 3\nsizes: 20 20 20\nencoding: raw\nendian: little\ndata file: k.dat\n"),
        ("k.mhd", "ObjectType = Image\nNDims = 3\nDimSize = 20 20 20\nElementType = MET_SHORT\nElementDataFile = k.dat\n"),
    ):
        (data / name).write_text(text)
    make_special(data / "k.dat", kind)
    save_nifti(data / "l.hdr", scan(2))
    (data / "l.img").unlink()
    make_special(data / "l.img", kind)
    save_nifti(data / "m.nii.gz", scan(3))
    make_special(data / "m.json", kind)
    (data / "bids").mkdir()
    save_nifti(data / "bids" / "n.nii.gz", scan(4))
    make_special(data / "bids" / "dataset_description.json", kind)
    listed, quarantine = run(data, tmp_path / "list.json")
    assert [Path(e["image"]).name for e in listed] == ["n.nii.gz", "good.nii.gz", "1.2.3-00.dcm"]
    texts = "No such device" if kind == "socket" else "no regular file"  # of what is read as text
    words = {"not_a_file": f"is a {kind}", "sidecar": texts}
    named = {n: words[reason] in detail for n, (reason, detail) in quarantine.items() if reason in words}
    assert named == dict.fromkeys(
        ("a.nii", "b.nii.gz", "c.nrrd", "d.mha", "e.npy", "f.npz", "g.mgz", "h.dcm", "i", "j.hdr", "k.nhdr", "k.mhd", "k.dat",
         "l.hdr", "m.nii.gz", "dataset_description.json"), True,
    )  # fmt: skip
    assert set(quarantine) == set(named)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_in_a_list_or_beside_a_scan_is_named_by_what_reads_it(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.nii.gz", "b.nrrd", "c.dcm", "d"):
        make_special(tmp_path / name, kind)
        with pytest.raises(BadVolume, match=f"{name}: is a {kind}, not a file"):
            open_volume(Entry(str(tmp_path / name), ()))
    save_nifti(tmp_path / "good.nii.gz", scan())
    entries = [{"image": str(tmp_path / n), "shape": [14, 12, 10]} for n in ("a.nii.gz", "b.nrrd", "d", "good.nii.gz")]
    write_datalist(tmp_path / "list.json", entries)
    lines: list[str] = []
    build(read_datalist(tmp_path / "list.json"), tmp_path / "cache", None, 0, lines.append)
    assert sum(f"is a {kind}" in line for line in lines) == 3 and "1 volumes cached" in lines[-1]
    folder = save_dicom(tmp_path / "series", scan())
    make_special(folder / "x.dcm", kind)
    assert open_volume(Entry(str(folder), ())).read().shape == (14, 12, 10)
    assert f"x.dcm: is a {kind}, not a file" in caplog.text
    assert [p.name for p in scans_in(tmp_path)] == [
        "a.nii.gz",
        "b.nrrd",
        "good.nii.gz",
        "series",
    ]  # the pipes fail in their turn


# ---------------------------------------------------------------------- odd headers


def odd(folder: Path) -> dict[str, tuple[str, str]]:
    """Files that made a library raise something of its own: name -> (reason, words)."""
    pydicom = pytest.importorskip("pydicom")
    expected = {}

    def edit(path: Path, at: int, value: bytes) -> None:
        path.write_bytes(path.read_bytes()[:at] + value + path.read_bytes()[at + len(value) :])

    save_nifti(folder / "affine.nii", scan(1))
    edit(folder / "affine.nii", 280, np.array([np.nan], "<f4").tobytes())
    expected["affine.nii"] = ("geometry", "not finite")
    save_nifti(folder / "infinite.nii", scan(1))
    edit(folder / "infinite.nii", 280, np.array([np.inf], "<f4").tobytes())
    expected["infinite.nii"] = ("geometry", "not finite")
    nib.save(nib.MGHImage(scan(2), np.eye(4)), folder / "type.mgh")
    edit(folder / "type.mgh", 20, (99).to_bytes(4, "big"))
    expected["type.mgh"] = ("unreadable", "cannot be opened")
    for name, text in (
        ("deep", "[" * 200_000), ("number", '{"spacing": [1, 1, 1' + 400 * "0" + "]}"), ("digits", '{"spacing": ' + 5000 * "9"),
        ("infinity", '{"spacing": [1, 1, 1e999]}'), ("true", '{"spacing": [1, 1, true]}'),
        ("large", '{"a": "' + "x" * 17 * 2**20 + '"}'),
    ):  # fmt: skip
        save_nifti(folder / f"{name}.nii", scan(3))
        (folder / f"{name}.json").write_text(text)
        expected[f"{name}.nii"] = ("sidecar", f"{name}.json")
    for name, words, changes in (
        ("three", "orientation (1.0, 0.0, 0.0)", {"ImageOrientationPatient": [1, 0, 0]}),
        ("place", "expected 6, 3, 2 finite numbers", {"ImagePositionPatient": [1, 0]}),
        ("one", "cannot be read", {"PixelSpacing": 1}),
        ("bit", "1 bits", {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}),
        ("none", "bits", {"BitsStored": 33}),
    ):
        path = save_dicom(folder / name, scan(4), series=f"1.2.3.{len(expected)}")
        for k, one in enumerate(sorted(path.iterdir())):
            header = pydicom.dcmread(one)
            header.update(changes)
            header.save_as(one.with_name(f"{name}-{k}.dcm"), enforce_file_format=True)
            one.unlink()
        expected[f"{name}-0.dcm"] = ("geometry" if "numbers" in words or "orientation" in words else "", words)
    for name, extents in (("minus", (9, -9, 9)), ("twice", (-9, 9, -9)), ("nothing", (9, 0, 9))):
        save_nifti(folder / f"{name}.nii", scan(1))
        edit(folder / f"{name}.nii", 42, np.array(extents, "<i2").tobytes())
        expected[f"{name}.nii"] = ("axes", "is empty, shape")
    for name, line in (
        ("eleven", "NDims = 11"),
        ("below", "NDims=-1"),
        ("many", f"NDims = {'9' * 20}"),
        ("colon", "NDims : 99"),
    ):
        header = f"ObjectType = Image\n{line}\nDimSize = 9 9 9\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
        (folder / f"{name}.mha").write_bytes(header.encode() + bytes(2 * 9**3))
        expected[f"{name}.mha"] = ("damaged", "1 to 10 axes")
    (folder / "far.mha").write_text(f"ObjectType = Image\nNDims = 3\nElementSpacing = 1{'0' * 400} 1 1\nDimSize = 9 9 9\n")
    expected["far.mha"] = ("unreadable", "cannot be opened: MetaImageIO: File cannot be read")  # and not at which address
    (folder / "typed.nrrd").write_bytes(b"NRRD0004\ntype: shorty\ndimension: 3\nsizes: 9 9 9\nencoding: raw\n\n" + bytes(1458))
    expected["typed.nrrd"] = ("unreadable", "cannot be opened: [nrrd] _nrrdReadNrrdParse_type: couldn't parse type")
    (folder / "skip.nrrd").write_text(
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 9 9 9\nencoding: gzip\nline skip: " + "9" * 5000 + "\n\n"
    )
    (folder / "null.nhdr").write_bytes(b"NRRD0004\ntype: short\ndimension: 3\nsizes: 9 9 9\nencoding: raw\ndata file: a\0b\n")
    (folder / "endless.nhdr").write_bytes(b"NRRD0004\n" + b"# " + b"x" * 70000 + b"\ndata file: endless.raw\n")
    (folder / "deep.npy").write_bytes(b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000)
    return expected | {
        "skip.nrrd": ("unreadable", ""), "null.nhdr": ("unreadable", ""), "endless.nhdr": ("unsupported", "does not end"),
        "deep.npy": ("unreadable", ""),
    }  # fmt: skip


def test_whatever_a_header_makes_a_library_raise_is_its_units_row(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    expected = odd(data)
    save_nifti(data / "good.nii.gz", scan())
    listed, quarantine = run(data, tmp_path / "list.json")
    assert [Path(e["image"]).name for e in listed] == ["good.nii.gz"]
    for name, (reason, words) in expected.items():
        assert name in quarantine, name
        assert quarantine[name][0] == (reason or quarantine[name][0]) and words in quarantine[name][1], (name, quarantine[name])
    for name in expected:
        if expected[name][0] != "sidecar":
            with pytest.raises(BadVolume, match=name.split(".")[0]):
                open_volume(Entry(str(next(data.rglob(name))), ())).read()


@pytest.mark.parametrize("how", ["native", "RLE", "JPEG"])
def test_a_slice_takes_no_memory_for_lengths_that_are_not_there(tmp_path: Path, how: str) -> None:
    """As ITK does, for an element of a gigabyte behind the voxels of a file of a kilobyte."""
    for path in save_dicom(tmp_path / "series", scan(5)).iterdir():
        if how != "native":
            compress_dicom(path, how)
        path.write_bytes(path.read_bytes() + b"\xfc\xff\xfc\xffOB\0\0" + (2**30).to_bytes(4, "little") + b"x")
    code = (
        "import resource, sys; from dinov2.data import Entry; from dinov2.data.volumes.opening import open_volume\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "import SimpleITK; before = used(); volume = open_volume(Entry(sys.argv[1], ())).read()\n"
        "print(volume.size, used() - before)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "series")]
    size, kib = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert int(size) == scan(5).size and int(kib) < 200 * 1024


FORESEEN_BY_NOBODY = "the process that read it ended with an error that nobody foresaw; it stands above"


@pytest.mark.parametrize("where", ["describe_place", "describe_voxels"])
@pytest.mark.parametrize(
    ("error", "reason", "detail"),
    [
        (MemoryError(), "memory", "cannot be examined: it takes more memory than there is"),
        (OSError(errno.EIO, "Input/output error"), "unreadable", "cannot be examined: [Errno 5] Input/output error"),
        *((e, "unreadable", FORESEEN_BY_NOBODY) for e in (RecursionError("x"), KeyError("x"), AssertionError())),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_happens_to_one_unit_is_its_row(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
    reason: str,
    detail: str,
    where: str,
) -> None:
    """Of a process of its own, if it must be, as a first index of a few files has it too."""
    for name in ("a", "b", "c"):
        save_nifti(tmp_path / "data" / f"{name}.nii", scan(ord(name)))
    monkeypatch.setattr(index_command, "examine", partial(examine_with_a_fault, where, error))
    listed, quarantine = run(tmp_path / "data", tmp_path / "list.json", "--workers", "1")
    assert [Path(e["image"]).name for e in listed] == ["b.nii", "c.nii"], "tried alone, they do not share its fate"
    assert quarantine == {"a.nii": (reason, detail)}
    said = capfd.readouterr().err
    if detail is FORESEEN_BY_NOBODY:
        assert f"a.nii: {detail}: please report it" in said and "Traceback" in said and type(error).__name__ in said
    else:
        assert "report" not in said and "Traceback" not in said, "a fault of the machine"
    monkeypatch.undo()  # memory is back, or a fault of ours is mended; the file is the same
    listed, quarantine = run(tmp_path / "data", tmp_path / "list.json")
    said = capfd.readouterr().out
    assert len(listed) == 3 and not quarantine
    assert "; 0 new or changed, 1 set aside before that are looked at again" in said
    run(tmp_path / "data", tmp_path / "list.json")
    assert "; 0 new or changed\n" in capfd.readouterr().out


def test_a_description_of_any_kind_does_not_end_the_index(tmp_path: Path) -> None:
    for name, text in (("deep", "[" * 200_000), ("large", " " * 17 * 2**20), ("odd", '{"modality": 5, "name": {"a": [1]}}')):
        save_nifti(tmp_path / "data" / name / "a.nii", scan(len(name)))
        (tmp_path / "data" / name / "dataset.json").write_text(text)
    (tmp_path / "data" / "odd" / "a.json").symlink_to("nowhere")
    listed, quarantine = run(tmp_path / "data", tmp_path / "list.json")
    assert len(listed) == 2 and set(quarantine) == {"a.json", "a.nii", "dataset.json"} and json.dumps(listed)


def test_a_list_of_any_numbers_and_depth_is_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    for text in ("[" * 200_000, '[{"image": "a.nii", "shape": [9, 9, 9], "spacing": [1, 1, 1' + 400 * "0" + "]}]"):
        path.write_text(text)
        with pytest.raises(BadInput, match=r"list\.json"):
            read_datalist(path)
    assert main(["cache", "build", str(path), "--cache-dir", str(tmp_path / "cache")]) == 2
