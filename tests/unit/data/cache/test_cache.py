"""The cache folder: exact, never stale, whole after whatever happens to it."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dinov2.data import read_datalist, write_datalist
from dinov2.data.cache import commands
from dinov2.data.cache import file as file_module
from dinov2.data.cache import folder as cache_module
from dinov2.data.cache import store as store_module
from dinov2.data.cache.commands import build, stats, verify
from dinov2.data.cache.file import DamagedItem, encode, open_item
from dinov2.data.cache.folder import MANIFEST, VolumeCache
from dinov2.data.cache.store import VolumeStore, load_volume
from dinov2.data.datalist import Datalist, Entry
from dinov2.data.preprocess import Volume
from dinov2.data.volumes.opening import RawVolume, describe, open_volume
from dinov2.errors import BadInput, BadVolume
from dinov2.streams import Kind, stream
from tests.conftest import ROOT
from tests.unit.data.cache.deadly import build_but_a

Lines = list[str]


def smooth_voxels(*shape: int, seed: int = 0) -> np.ndarray:
    """What compresses, as a scan does: structure, much background, integer values."""
    rng = np.random.default_rng(seed)
    wave = sum(np.sin(2 * np.pi * 2 * g / n) for g, n in zip(np.indices(shape), shape, strict=True))
    voxels = np.round(200 + 60 * wave + 5 * rng.standard_normal(shape))
    voxels[wave < 0] = 0
    return voxels.astype(np.int16)


def save(path: Path, voxels: np.ndarray, zooms: tuple[float, ...] = (1, 1, 2)) -> Path:
    image = nib.Nifti1Image(voxels, np.eye(4))
    image.header.set_zooms((*zooms, *[1.0] * (voxels.ndim - 3)))
    nib.save(image, path)
    return path


@pytest.fixture
def volumes(tmp_path: Path) -> Datalist:
    """Three volumes, one with three time points, one incompressible, in a list."""
    folder = tmp_path / "volumes"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(-32000, 32000, (20, 22, 18)).astype(np.int16)
    timed = np.stack([smooth_voxels(26, 24, 20, seed=s) for s in range(3)], -1)
    for name, voxels in (("a", smooth_voxels(40, 44, 30)), ("noise", noise), ("timed", timed)):
        save(folder / f"{name}.nii.gz", voxels)
    rows = [{"image": str(p), "shape": list(nib.load(p).shape)} for p in sorted(folder.glob("*.gz"))]
    write_datalist(tmp_path / "list.json", rows)
    return read_datalist(tmp_path / "list.json")


def built(volumes: Datalist, folder: Path) -> Lines:
    lines: Lines = []
    assert build(volumes, folder, None, 0, lines.append) == 0
    return lines


def command(action: str, volumes: Datalist, folder: Path, *extra: str) -> list[str]:
    return [sys.executable, "-m", "dinov2", "cache", action, volumes.path, "--cache-dir", str(folder), *extra]


def same(a: Volume, b: Volume) -> bool:
    return torch.equal(a.voxels, b.voxels) and (a.spacing_mm, a.moved_axis, a.box) == (b.spacing_mm, b.moved_axis, b.box)


# ---------------------------------------------------------------------- what is served


def test_what_is_cached_is_what_the_source_gives(volumes: Datalist, tmp_path: Path) -> None:
    built(volumes, tmp_path / "cache")
    cache = VolumeCache(tmp_path / "cache")
    for entry in volumes.entries:
        for t in range(3 if "timed" in entry.image else 1):
            assert same(cache.load(entry, t), load_volume(entry, t)), entry.image
    headers = {Path(open_item(p).header["source"]["image"]).name: open_item(p).header for p in cache.items()}
    assert headers["a.nii.gz"]["slabs"] is not None and headers["noise.nii.gz"]["slabs"] is None
    assert len(list(cache.items())) == 5


def test_a_run_draws_the_same_with_and_without_a_cache(volumes: Datalist, tmp_path: Path) -> None:
    """Time points too: drawn per draw, never frozen."""
    built(volumes, tmp_path / "cache")
    plain = VolumeStore(volumes.entries, 0)
    cached = VolumeStore(volumes.entries, 0, VolumeCache(tmp_path / "cache"))
    sums = set()
    for i in range(30):
        one, other = (store.get(2, stream(0, Kind.SAMPLE, i)) for store in (plain, cached))
        assert same(one, other)
        sums.add(int(one.voxels.long().sum()))
    assert len(sums) == 3


def test_with_everything_cached_the_sources_voxels_are_not_read(
    volumes: Datalist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(volumes, tmp_path / "cache")
    monkeypatch.setattr("dinov2.data.cache.store.open_volume", lambda entry: pytest.fail(f"opened {entry.image}"))
    store = VolumeStore(volumes.entries, 0, VolumeCache(tmp_path / "cache"))
    for index in range(3):
        store.get(index, np.random.default_rng(0))


def test_a_copied_data_set_finds_its_cache(volumes: Datalist, tmp_path: Path) -> None:
    built(volumes, tmp_path / "cache")
    subprocess.run(["cp", "-rp", tmp_path / "volumes", tmp_path / "copy"], check=True)
    entry = volumes.entries[0]
    copy = Entry(entry.image.replace("/volumes/", "/copy/"), entry.shape)
    assert VolumeCache(tmp_path / "cache").load(copy, 0) is not None


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_changed_source_is_not_served_from_the_cache(volumes: Datalist, tmp_path: Path, keep_time: bool) -> None:
    built(volumes, tmp_path / "cache")
    path = Path(volumes.entries[0].image)
    before = path.stat()
    save(path, smooth_voxels(40, 44, 30, seed=9))
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    cache = VolumeCache(tmp_path / "cache")
    assert cache.load(volumes.entries[0], 0) is None
    assert same(load_volume(volumes.entries[0], 0, cache), load_volume(volumes.entries[0], 0))
    lines: Lines = []
    assert verify(volumes, tmp_path / "cache", False, lines.append) == 0 and "1 volumes of other" in lines[-1]


@pytest.mark.parametrize("what", ["its time alone tells", "its beginning alone tells"])
def test_a_change_that_leaves_the_size_is_noticed(tmp_path: Path, what: str) -> None:
    """Uncompressed, so that one voxel changes one byte: in the middle with a new time, or near the start with the old one."""
    path = save(tmp_path / "v.nii", smooth_voxels(64, 60, 50))
    entry, cache = Entry(str(path), (64, 60, 50)), tmp_path / "cache"
    load_volume(entry, 0, VolumeCache(cache))
    assert VolumeCache(cache).load(entry, 0) is not None
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2 if what == "its time alone tells" else 1000] ^= 1
    path.write_bytes(data)
    later = 0 if what == "its beginning alone tells" else 1000
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + later))
    assert VolumeCache(cache).load(entry, 0) is None


@pytest.mark.parametrize("begun_again", [False, True])
def test_a_file_that_its_writer_has_just_finished_is_not_written_into(
    tmp_path: Path, begun_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened under its temporary name, renamed by its writer before the lock was asked for."""
    temporary, final = tmp_path / ".x.tmp", tmp_path / "x.vol"
    temporary.write_bytes(b"whole")
    lock = cache_module.fcntl.flock

    def finish_first(*arguments: object) -> None:
        os.replace(temporary, final)
        if begun_again:  # by a third process
            temporary.write_bytes(b"")
        lock(*arguments)

    monkeypatch.setattr(cache_module.fcntl, "flock", finish_first)
    with cache_module._exclusive(temporary) as file:
        assert file is None
    assert final.read_bytes() == b"whole"


def test_a_volume_that_there_is_no_memory_for_is_not_replaced(volumes: Datalist, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was set aside as unreadable: a busy machine decided what a run learns from."""

    def without_memory(_: int) -> np.ndarray:
        raise MemoryError

    def opened(entry: Entry) -> RawVolume:
        raw = open_volume(entry)
        return replace(raw, image=replace(raw.image, read=without_memory))

    store = VolumeStore(volumes.entries, 0)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "open_volume", opened)
        with pytest.raises(BadInput, match=r"more memory than there is: use fewer train.num_workers") as caught:
            store.get(0, stream(0, Kind.SAMPLE, 0))
    assert not isinstance(caught.value, BadVolume)
    assert store.get(0, stream(0, Kind.SAMPLE, 0)).voxels.numel() > 0


def test_what_the_list_says_of_a_file_is_part_of_what_is_cached(volumes: Datalist, tmp_path: Path) -> None:
    built(volumes, tmp_path / "cache")
    cache, entry = VolumeCache(tmp_path / "cache"), volumes.entries[0]
    assert cache.load(Entry(entry.image, entry.shape, spacing_mm=(3, 1, 1)), 0) is None
    timed = volumes.entries[2]
    assert cache.load(Entry(timed.image, timed.shape, axes="xyzc", channel=1), 0) is None


# ---------------------------------------------------------------------- damage


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[:-100]
    elif how == "bit in the voxels":
        data[-50] ^= 4
    elif how == "bit in the header":
        data[data.index(b"spacing_mm") + 14] ^= 1
    elif how == "empty":
        data = bytearray()
    elif how == "another file":
        data = bytearray(b"hello" * 100)
    path.write_bytes(data)


DAMAGES = ["truncated", "bit in the voxels", "bit in the header", "empty", "another file"]


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["a", "noise"])
def test_a_damaged_item_is_named_and_made_anew(
    volumes: Datalist, tmp_path: Path, how: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    built(volumes, tmp_path / "cache")
    entry = next(e for e in volumes.entries if name in Path(e.image).name)
    path = VolumeCache(tmp_path / "cache").path(VolumeCache(tmp_path / "cache").key(entry, 0))
    whole = path.read_bytes()
    damage(path, how)
    lines: Lines = []
    assert verify(volumes, tmp_path / "cache", False, lines.append) == 2
    assert lines[0].startswith(f"{path}: ") and "1 damaged" in lines[-1]
    cache = VolumeCache(tmp_path / "cache")
    assert same(load_volume(entry, 0, cache), load_volume(entry, 0))
    assert str(path) in caplog.text and entry.image in caplog.text
    assert path.read_bytes() == whole
    assert same(cache.load(entry, 0), load_volume(entry, 0))


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["a", "noise"])
def test_what_is_damaged_after_it_was_read_is_noticed_too(
    volumes: Datalist, tmp_path: Path, how: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Once a process had read a file it trusted whatever stood there later: it ended with a trace, or used wrong voxels."""
    built(volumes, tmp_path / "cache")
    cache, entry = VolumeCache(tmp_path / "cache"), next(e for e in volumes.entries if name in Path(e.image).name)
    assert cache.load(entry, 0) is not None
    damage(cache.path(cache.key(entry, 0)), how)
    assert same(load_volume(entry, 0, cache), load_volume(entry, 0))
    assert "made anew from its source" in caplog.text


def test_a_file_is_held_against_its_checksum_once(volumes: Datalist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(volumes, tmp_path / "cache")
    cache = VolumeCache(tmp_path / "cache")
    cache.load(volumes.entries[0], 0)
    monkeypatch.setattr(file_module.zlib, "crc32", None)
    assert cache.load(volumes.entries[0], 0) is not None


def test_verify_removes_what_is_damaged_and_build_makes_it_again(volumes: Datalist, tmp_path: Path) -> None:
    built(volumes, tmp_path / "cache")
    path = next(VolumeCache(tmp_path / "cache").items())
    damage(path, "truncated")
    assert verify(volumes, tmp_path / "cache", True, lambda _: None) == 2 and not path.exists()
    assert any("1 volumes cached" in line and "4 were there" in line for line in built(volumes, tmp_path / "cache"))
    assert verify(volumes, tmp_path / "cache", False, lambda _: None) == 0


def test_every_single_bit_counts(tmp_path: Path) -> None:
    volume = Volume(np.arange(2 * 3 * 4, dtype=np.int16).reshape(1, 2, 3, 4), (1.0, 1.0, 2.5), 1, (slice(0, 2),) * 3)
    data = encode(volume, {"image": "x"})
    path = tmp_path / "bits.vol"
    path.write_bytes(data)
    assert same(open_item(path).volume(), volume)
    for bit in range(0, 8 * len(data), 7):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(DamagedItem):
            open_item(path)


# ---------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    "change, words",
    [
        ({"version": 0}, "has version 0, this program writes version 1"),
        ({"preprocessing": {"percentiles": [1, 99]}}, "made with preprocessing foreground=None"),
        ({"format": "photos"}, "not that of a volume cache"),
        ({"extra": 1}, "keys that this program does not know"),
    ],
)
def test_a_folder_of_another_kind_is_refused_by_name(tmp_path: Path, change: dict, words: str) -> None:
    folder = tmp_path / "cache"
    VolumeCache(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **change}))
    with pytest.raises(BadInput, match=words) as err:
        VolumeCache(folder)
    assert str(folder) in str(err.value) and "choose another --cache-dir" in str(err.value)


def test_a_changed_percentile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    VolumeCache(tmp_path / "cache")
    monkeypatch.setitem(cache_module.PREPROCESSING, "percentiles", [0.5, 99.5])
    with pytest.raises(BadInput, match=r"percentiles=\[0.05, 99.95\], this program uses \[0.5, 99.5\]"):
        VolumeCache(tmp_path / "cache")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(BadInput, match="holds other files"):
        VolumeCache(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="choose another --cache-dir"):
        VolumeCache(tmp_path / "file")


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_said_once_and_the_run_goes_on(
    volumes: Datalist, tmp_path: Path, error: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = VolumeCache(tmp_path / "cache")

    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(cache_module.os, "replace", refuse)
    for entry in volumes.entries:
        assert same(load_volume(entry, 0, cache), load_volume(entry, 0))
    assert caplog.text.count(os.strerror(error)) == 1
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.name != MANIFEST]


def test_a_full_disk_during_a_build_leaves_a_usable_cache(volumes: Datalist, tmp_path: Path) -> None:
    """A file-size limit stands for the disk: the largest volume does not fit, what was written stays."""
    limited = ["bash", "-c", 'ulimit -f 24; trap "" XFSZ; exec "$@"', "-"]
    result = subprocess.run(
        [*limited, *command("build", volumes, tmp_path / "cache", "--workers", "0")], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "File too large" in result.stderr + result.stdout and "stays usable" in result.stdout
    cache = VolumeCache(tmp_path / "cache")
    assert all(open_item(p) for p in cache.items()) and not list((tmp_path / "cache").glob("??/.*"))
    assert any("volumes cached" in line for line in built(volumes, tmp_path / "cache"))
    assert verify(volumes, tmp_path / "cache", False, lambda _: None) == 0


def test_the_forecast_refuses_a_disk_that_is_too_small(
    volumes: Datalist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov2.data.cache.commands.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(BadInput, match="GiB are needed and .* GiB are free"):
        build(volumes, tmp_path / "cache", None, 0, lambda _: None)
    lines: Lines = []
    build(volumes, tmp_path / "other", 5e-7, 0, lines.append)  # a part of 500 bytes fits
    assert "has reached its limit" in lines[-1]


def test_the_folder_stops_growing_at_its_limit(volumes: Datalist, tmp_path: Path) -> None:
    built(volumes, tmp_path / "all")
    whole = sum(p.stat().st_size for p in VolumeCache(tmp_path / "all").items())
    lines: Lines = []
    assert build(volumes, tmp_path / "part", 0.6 * whole / 2**30, 0, lines.append) == 2
    size = sum(p.stat().st_size for p in VolumeCache(tmp_path / "part").items())
    assert 0 < size <= 0.6 * whole and "has reached its limit" in lines[-1]
    cache = VolumeCache(tmp_path / "part", 0.6 * whole / 2**30)
    assert all(same(load_volume(e, 0, cache), load_volume(e, 0)) for e in volumes.entries)


def test_stats_say_what_is_there(volumes: Datalist, tmp_path: Path) -> None:
    built(volumes, tmp_path / "cache")
    lines: Lines = []
    assert stats(volumes, tmp_path / "cache", lines.append) == 0
    assert "3 of 3 entries, 5 volumes" in lines[1] and "of float32" in lines[1]
    assert "4 compressed, 1 stored as they are; 0 not of this list" in lines[2]


def test_an_unusable_entry_is_named_and_the_rest_is_cached(volumes: Datalist, tmp_path: Path) -> None:
    Path(volumes.entries[1].image).write_bytes(b"junk")
    lines = built(volumes, tmp_path / "cache")
    assert any("cannot be used" in line and volumes.entries[1].image in line for line in lines)
    assert "4 volumes cached" in lines[-1] and "1 entries cannot be used" in lines[-1]
    assert verify(volumes, tmp_path / "cache", False, lambda _: None) == 2


# ---------------------------------------------------------------------- many processes, and their end


@pytest.fixture
def many(tmp_path: Path) -> Datalist:
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(24):
        save(folder / f"{i:02}.nii.gz", smooth_voxels(64, 60, 50, seed=i))
    return listed(folder)


def listed(folder: Path) -> Datalist:
    path = folder.with_suffix(".json")
    write_datalist(path, [{"image": str(p), "shape": [64, 60, 50]} for p in sorted(folder.glob("*.gz"))])
    return read_datalist(path)


def test_two_builders_at_once_make_one_whole_cache(many: Datalist, tmp_path: Path) -> None:
    both = [
        subprocess.Popen(
            command("build", many, tmp_path / "cache", "--workers", "1"), cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    texts = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], texts
    assert verify(many, tmp_path / "cache", False, lambda _: None) == 0
    assert len(list(VolumeCache(tmp_path / "cache").items())) == 24 and not list((tmp_path / "cache").glob("??/.*"))


@pytest.mark.slow
def test_a_volume_that_ends_the_process_that_reads_it_is_named_and_the_others_are_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcd":
        save(tmp_path / f"{name}.nii", smooth_voxels(20, 18, 16, seed=ord(name)))
    write_datalist(tmp_path / "list.json", [describe(str(tmp_path / f"{name}.nii")) for name in "abcd"])
    monkeypatch.setattr(commands, "_build_in_worker", build_but_a)
    lines: Lines = []
    assert build(read_datalist(tmp_path / "list.json"), tmp_path / "cache", None, 2, lines.append) == 0
    assert any("a.nii: the process that read it was ended by SIGKILL: if memory ran out, use fewer" in line for line in lines)
    assert "3 volumes cached" in lines[-1] and "1 entries cannot be used" in lines[-1]


@pytest.mark.parametrize("number, returncode", [(signal.SIGKILL, -9), (signal.SIGINT, 75)])
def test_a_build_that_is_ended_anywhere_goes_on_where_it_was(
    many: Datalist, tmp_path: Path, number: int, returncode: int
) -> None:
    folder = tmp_path / "cache"
    for i in range(24, 96):  # enough that a busy machine stops the build before its end
        shutil.copy(tmp_path / "many" / f"{i % 24:02}.nii.gz", tmp_path / "many" / f"{i:02}.nii.gz")
    many = listed(tmp_path / "many")
    counts = []
    for wanted in (4, 12):
        process = subprocess.Popen(
            command("build", many, folder, "--workers", "1"),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while len(list(folder.glob("??/*.vol"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(process.pid, number)
        text = process.communicate(timeout=60)[0]
        counts.append(len(list(folder.glob("??/*.vol"))))
        assert process.returncode == returncode, text
        assert all(open_item(p) for p in folder.glob("??/*.vol"))
        if number == signal.SIGINT:
            assert "the same command continues" in text
    assert 4 <= counts[0] < counts[1] < 96
    (folder / "ab").mkdir(exist_ok=True)
    (folder / "ab" / ".abandoned.tmp").write_bytes(b"half")  # as a kill inside a write leaves it
    lines = built(many, folder)
    assert any("left half-written" in line for line in lines)
    assert verify(many, folder, False, lambda _: None) == 0 and not list(folder.glob("??/.*"))


def _fill(folder: Path, datalist: str, first: int) -> None:
    cache, entries = VolumeCache(folder), read_datalist(datalist).entries
    for i in range(len(entries)):
        load_volume(entries[(first + i) % len(entries)], 0, cache)


def test_processes_that_fill_and_read_one_cache_agree(many: Datalist, tmp_path: Path) -> None:
    VolumeCache(tmp_path / "cache")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_fill, args=(tmp_path / "cache", many.path, first)) for first in (0, 0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert verify(many, tmp_path / "cache", False, lambda _: None) == 0


def test_the_command_line_builds_verifies_and_describes(volumes: Datalist, tmp_path: Path) -> None:
    run: Callable[..., subprocess.CompletedProcess] = lambda action, *extra: subprocess.run(  # noqa: E731
        command(action, volumes, tmp_path / "cache", *extra), cwd=ROOT, capture_output=True, text=True
    )
    first = run("build")
    assert first.returncode == 0 and "GiB at 16 bits" in first.stdout and "5 volumes cached" in first.stdout, first.stderr
    assert run("verify").returncode == 0 and "3 of 3 entries" in run("stats").stdout
    refused = run("build", "--min-axis", "100")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
