"""The table of embeddings: rows in the list's order, the same however the work was cut, and nothing bad lost silently."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dinov2.cli import main
from dinov2.data import Entry, write_datalist
from dinov2.data.corpus.index.examine import content_sha
from dinov2.errors import BadInput
from dinov2.features import embed as embed_module
from dinov2.features import embed_table
from dinov2.features.embed import EmbedRequest, embed, shard_of_rank
from dinov2.features.embed_rows import file_names
from dinov2.features.embed_table import EmbeddingTable
from dinov2.features.encoder import Encoder, load_encoder
from dinov2.features.views import View
from dinov2.models.vision_transformer import vit_tiny_3d
from dinov2.run.eval.embed import main as submit
from dinov2.run.eval.embed import shard_commands
from tests.unit.data.corpus.test_index import save_dicom, scan
from tests.unit.features.deadly import store_but_11

NUM_SCANS = 40  # three parts
BAD = {3: "truncated", 17: "constant", 39: "missing"}


def write_scan(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = rng.integers(9, 17, 3)
    nib.save(nib.Nifti1Image(rng.integers(0, 900, shape).astype(np.int16), np.diag([2.0, 2.0, 3.0, 1.0])), path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "t.pth"
    torch.save(vit_tiny_3d(patch_size=8, img_size=16, init_values=0.5).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def encoder(weights: Path) -> Encoder:
    return load_encoder(weights, "cpu")


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A list in another order than that of its files' names, three of them bad; one says its hash itself."""
    (tmp_path / "data").mkdir()
    items = []
    for i in range(NUM_SCANS):
        path = tmp_path / "data" / f"{(i * 7) % NUM_SCANS:02d}.nii"
        write_scan(path, i)
        items.append({"image": str(path), "shape": [9, 9, 9], "spacing": [2, 2, 3]})
    items[5]["sha"] = "abc"
    Path(items[3]["image"]).write_bytes(Path(items[3]["image"]).read_bytes()[:600])
    nib.save(nib.Nifti1Image(np.full((9, 9, 9), 5.0, np.float32), np.eye(4)), items[17]["image"])
    Path(items[39]["image"]).unlink()
    write_datalist(tmp_path / "list.json", items)
    return tmp_path / "list.json"


def paths_of(scans: Path) -> list[str]:
    return [str(scans.parent / item["image"]) for item in json.loads(scans.read_text())]


def relative(paths: list[str], folder: Path) -> list[str]:
    return [str(Path(path).relative_to(folder)) for path in paths]


def run(scans: Path, encoder: Encoder, output: Path, **request: object) -> tuple[int, list[str]]:
    said: list[str] = []
    return embed(scans, encoder, EmbedRequest(output, **request), said.append), said


def test_a_row_is_what_the_encoder_gives_in_the_lists_order_and_bad_scans_are_listed(
    scans: Path, encoder: Encoder, tmp_path: Path
) -> None:
    code, said = run(scans, encoder, tmp_path / "f.parquet")
    table = pq.read_table(tmp_path / "f.parquet")
    paths, good = paths_of(scans), [i for i in range(NUM_SCANS) if i not in BAD]
    assert code == 0 and table["path"].to_pylist() == relative([paths[i] for i in good], tmp_path)
    for row, i in ((0, 0), (4, 5), (36, 38)):
        found = encoder(paths[i])
        np.testing.assert_array_equal(table["cls"][row].as_py(), found.cls[0])
        np.testing.assert_array_equal(table["pooled"][row].as_py(), found.pooled[0])
        assert table["sha"][row].as_py() == ("abc" if i == 5 else content_sha(Entry(paths[i], ())))
    quarantine = json.loads((tmp_path / "f.quarantine.json").read_text())
    assert [(row["path"], row["reason"]) for row in quarantine] == [(paths[i], reason) for i, reason in BAD.items()]
    assert said[-1].endswith("3 set aside: 1 truncated, 1 constant, 1 missing") and not (tmp_path / "f.parts").exists()
    code, said = run(scans, encoder, tmp_path / "f.parquet")
    assert code == 0 and "is there already" in said[0]


def test_a_scan_that_ends_the_process_that_reads_it_is_listed_and_the_others_have_rows(
    scans: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed_module, "_store", store_but_11)
    assert run(scans, encoder, tmp_path / "f.parquet", num_workers=2)[0] == 0
    rows = json.loads((tmp_path / "f.quarantine.json").read_text())
    (row,) = [row for row in rows if row["path"].endswith("11.nii")]
    assert (row["reason"], row["detail"]) == ("unreadable", "the process that read it was ended by SIGKILL")
    assert len(rows) == 4 and pq.read_metadata(tmp_path / "f.parquet").num_rows == NUM_SCANS - 4


def test_shards_in_any_order_make_the_bytes_of_one_run(scans: Path, encoder: Encoder, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    run(scans, encoder, tmp_path / "a" / "f.parquet")
    for which in (2, 3, 1):
        assert not (tmp_path / "b" / "f.parquet").exists()
        code, said = run(scans, encoder, tmp_path / "b" / "f.parquet", shard=(which, 3))
        assert code == 0
        if which == 2:
            assert said == ["shard 2/3 is done; 2 of 3 parts are still to come from others"]
    for name in ("f.parquet", "f.quarantine.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert run(scans, encoder, tmp_path / "b" / "f.parquet", shard=(2, 3))[1][0].endswith("remove it to make it again")


def test_a_run_continues_after_the_parts_that_are_there(
    scans: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And after a part whose file is damaged was removed, as the message says."""
    run(scans, encoder, tmp_path / "f.parquet", shard=(1, 3))
    run(scans, encoder, tmp_path / "f.parquet", shard=(2, 3))
    (tmp_path / "f.parts" / "000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match="000001.parquet: is damaged: remove it and start the same command again"):
        run(scans, encoder, tmp_path / "f.parquet")
    (tmp_path / "f.parts" / "000001.parquet").unlink()
    loaded: list[int] = []
    load = embed_module._load
    monkeypatch.setattr(embed_module, "_load", lambda *args: (loaded.append(args[-1][0]), load(*args))[1])
    assert run(scans, encoder, tmp_path / "f.parquet")[0] == 0
    assert loaded == list(range(16, 32))
    assert pq.read_metadata(tmp_path / "f.parquet").num_rows == NUM_SCANS - 3


@pytest.mark.parametrize("error", [pa.ArrowMemoryError("malloc of size 9 failed"), PermissionError(13, "Permission denied")])
def test_a_part_that_the_machine_cannot_read_is_not_called_damaged(
    scans: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Or somebody would remove it."""
    run(scans, encoder, tmp_path / "f.parquet", shard=(1, 3))

    def refused(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pq, "read_table", refused)
    with pytest.raises((BadInput, MemoryError)) as caught:
        run(scans, encoder, tmp_path / "f.parquet")
    assert "damaged" not in str(caught.value) and "remove" not in str(caught.value)
    monkeypatch.undo()
    assert run(scans, encoder, tmp_path / "f.parquet")[0] == 0


def test_columns_of_what_the_list_knows_with_paths_from_the_lists_folder(encoder: Encoder, tmp_path: Path) -> None:
    for place in ("set/a", "set/b", "other/a"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        write_scan(tmp_path / f"{place}.nii", 0)
    voxels = np.random.default_rng(0).integers(0, 900, (9, 10, 11, 2)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "set" / "two.nii")
    facts = {"patient": 7, "modality": "MR", "organ": "brain", "series": "3 T1w"}
    items = [
        {"image": str(tmp_path / "set/a.nii"), "shape": [9, 9, 9], "spacing": [1.0, 2.0, 0.7], **facts},
        {"image": str(tmp_path / "set/b.nii"), "shape": [9, 9, 9], "case": "its own", "patient": None},
        {"image": str(tmp_path / "other/a.nii"), "shape": [9, 9, 9], "id": "a/b", "case": "not this"},
        *({"image": str(tmp_path / "set/two.nii"), "shape": [9, 10, 11, 2], "axes": "xyzc", "channel": c} for c in (0, 1)),
    ]
    write_datalist(tmp_path / "set" / "list.json", items)
    run(tmp_path / "set" / "list.json", encoder, tmp_path / "f.parquet", patch_tokens=True, view=View("resize", 16))
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["id"].to_pylist() == ["set_a", "its own", "a/b", "set_two_0000", "set_two_0001"]
    assert table["path"].to_pylist() == ["a.nii", "b.nii", "../other/a.nii", "two.nii", "two.nii"]
    assert table["channel"].to_pylist() == [None, None, None, 0, 1]
    for name, value in (("patient", "7"), ("modality", "MR"), ("organ", "brain"), ("series", "3 T1w")):
        assert table[name].to_pylist() == [value, None, None, None, None], name
    assert table["spacing"].to_pylist() == [*[[2.0, 2.0, 3.0]] * 3, *[[1.0, 1.0, 1.0]] * 2]  # the files', not a list's
    files = ["set_a", "its own", "a_b", "set_two_0000", "set_two_0001"]
    assert table["patches"].to_pylist() == [f"f.patches/{name}.npz" for name in files]
    assert sorted(p.stem for p in (tmp_path / "f.patches").iterdir()) == sorted(files)


def test_a_series_number_and_description_come_from_its_files_through_the_index(encoder: Encoder, tmp_path: Path) -> None:
    save_dicom(tmp_path / "data" / "one", scan(), number=4, description="CT  thin", patient="Doe^Jane")
    run(tmp_path / "data", encoder, tmp_path / "f.parquet", view=View("resize", 16))
    [row] = pq.read_table(tmp_path / "f.parquet").to_pylist()
    assert (row["id"], row["path"]) == ("1.2.3-00", "data/one/1.2.3-00.dcm")
    assert (row["modality"], row["organ"], row["series"], row["spacing"]) == ("CT", "knee", "4 CT thin", [0.75, 1.25, 3.0])
    assert row["patient"] and "Doe" not in row["patient"]


def test_files_of_scans_have_names_of_their_own_whatever_their_ids_are() -> None:
    long = "x" * 400
    names = file_names(["a", "a_2", "a", "a", "a/b", "a_b", "a\nb", long, long, "\udcff"])
    assert names == ["a", "a_2", "a_3", "a_4", "a_b", "a_b_2", "a_b_3", "x" * 200, "x" * 200 + "_2", "?"]


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_table_begun_by_an_earlier_version_is_refused(
    scans: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_finished: bool
) -> None:
    """Its columns are others: a part of it would not fit, and a table is not what it is said to be."""
    monkeypatch.setattr(embed_module, "FORMAT", 1)
    run(scans, encoder, tmp_path / "f.parquet", shard=(1, 1) if is_finished else (2, 2))
    monkeypatch.undo()
    with pytest.raises(BadInput, match="was made with another table format: choose another --output or remove it"):
        run(scans, encoder, tmp_path / "f.parquet")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"view": View("resize")}, "made with another mode:"),
        ({"patch_tokens": True}, "made with another patch tokens and layers:"),
        ({"seed": 4}, "made with another network"),
        ({"source": "list.json"}, "made with another list and number of scans:"),
    ],
)
@pytest.mark.parametrize("is_finished", [False, True])
def test_parts_and_tables_of_something_else_are_refused(
    scans: Path, encoder: Encoder, tmp_path: Path, change: dict, words: str, is_finished: bool
) -> None:
    write_datalist(tmp_path / "short.json", [{"image": p, "shape": [9, 9, 9]} for p in paths_of(scans)[:3]])
    short = tmp_path / "short.json"
    run(short, encoder, tmp_path / "f.parquet", shard=(1, 1) if is_finished else (2, 2))
    other = load_encoder("vit_tiny_3d", "cpu", seed=change["seed"]) if "seed" in change else encoder
    request = {k: v for k, v in change.items() if k in ("view", "patch_tokens")}
    with pytest.raises(BadInput, match=words):
        run(tmp_path / change.get("source", "short.json"), other, tmp_path / "f.parquet", **request)


def test_patch_tokens_lie_beside_the_table_with_their_affine(encoder: Encoder, tmp_path: Path) -> None:
    write_scan(tmp_path / "a.nii", 0)
    write_datalist(tmp_path / "list.json", [{"image": str(tmp_path / "a.nii"), "shape": [9, 9, 9]}])
    run(tmp_path / "list.json", encoder, tmp_path / "f.parquet", patch_tokens=True, view=View(layers=2))
    [name] = pq.read_table(tmp_path / "f.parquet")["patches"].to_pylist()
    found, wanted = np.load(tmp_path / name), encoder(tmp_path / "a.nii", layers=2)
    assert name == "f.patches/a.npz"
    np.testing.assert_array_equal(found["patch"], wanted.patch[0])
    np.testing.assert_array_equal(found["affine"], wanted.affine)


def test_a_folder_is_indexed_first_and_its_bad_files_are_listed_too(
    scans: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--weights", str(weights), "--device", "cpu", "--mode", "sliding_window", "--workers", "0"]
    assert main(["embed", str(tmp_path / "data"), *words, "--output", str(tmp_path / "f.parquet")]) == 0
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["path"].to_pylist() == sorted(relative([p for i, p in enumerate(paths_of(scans)) if i not in BAD], tmp_path))
    reasons = {row["reason"] for row in json.loads((tmp_path / "f.quarantine.json").read_text())}
    assert reasons == {"truncated", "constant"} and "2 set aside" in capsys.readouterr().out
    assert main(["embed", str(tmp_path), *words, "--output", str(tmp_path / "f.parquet")]) == 2
    assert main(["embed", str(tmp_path / "data"), *words, "--output", str(tmp_path / "g.parquet"), "--shard", "1/2"]) == 2


def test_scans_with_features_that_are_not_finite_are_set_aside(scans: Path, tmp_path: Path, weights: Path) -> None:
    broken = load_encoder(weights, "cpu")
    with torch.no_grad():
        broken.backbone.norm.weight[0] = torch.nan
    with pytest.raises(BadInput, match="none of the 40 scans can be used .*00.nii: the network's features are not finite"):
        run(scans, broken, tmp_path / "f.parquet")
    rows = json.loads((tmp_path / "f.quarantine.json").read_text())
    assert len(rows) == NUM_SCANS and rows[0]["reason"] == "non_finite_features" and not (tmp_path / "f.parquet").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["none.json"], "none.json: no such list or folder"),
        (["list.json", "--mode", "half"], "choose one of full_image, resize, sliding_window"),
        (["list.json", "--size", "20"], "multiple of the network's patch size 8"),
        (["list.json", "--layers", "99"], "the network has 12"),
        (["list.json", "--shard", "3/2"], "--shard 3/2: write it as"),
        (["list.json", "--output", "list.json"], "list.json: is there and no Parquet file"),
        (["list.json", "--output", "list.json/f.parquet"], "Not a directory: give the name of a file to write"),
        (["list.json", "--weights", "list.json"], "not a checkpoint of tensors"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    scans: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(scans.parent)
    assert main(["embed", "--weights", str(weights), "--output", "f.parquet", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error


def test_scans_that_are_large_for_one_pass_are_told_once(
    scans: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embed_module, "MANY_PATCHES", 3)
    for mode, times in (("full_image", 1), ("sliding_window", 0)):
        caplog.clear()
        run(scans, encoder, tmp_path / f"{mode}.parquet", view=View(mode, 8), num_workers=0)
        told = [r.getMessage() for r in caplog.records if "patches in one pass" in r.getMessage()]
        assert len(told) == times and all("--mode sliding_window or resize" in line for line in told)


def test_ranks_of_torchrun_are_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shard_of_rank((2, 3)) == (2, 3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert shard_of_rank((1, 1)) == (2, 4)
    with pytest.raises(BadInput, match="leave --shard out"):
        shard_of_rank((2, 3))


def test_an_array_of_jobs_makes_the_table(scans: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = [str(scans), "--weights", str(weights), "--output", str(tmp_path / "f.parquet"), "--device", "cpu"]
    shards, last, folder = shard_commands(rest, 2, cpus=0)
    assert [main(command) for command in (*shards, last)] == [0, 0, 0]
    assert pq.read_metadata(tmp_path / "f.parquet").num_rows == NUM_SCANS - 3 and folder == tmp_path / "f.jobs"
    for wrong in ([*rest, "--shard", "1/2"], [str(tmp_path), *rest[1:]]):
        with pytest.raises(BadInput):
            shard_commands(wrong, 2, cpus=0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(["--shards", "2", *rest]) == 2


def test_a_flipped_bit_of_a_part_is_never_taken(scans: Path, encoder: Encoder, tmp_path: Path) -> None:
    run(scans, encoder, tmp_path / "f.parquet", shard=(1, 3))
    part = tmp_path / "f.parts" / "000000.parquet"
    whole, rng = part.read_bytes(), np.random.default_rng(0)
    table = EmbeddingTable(
        tmp_path / "f.parquet", json.loads((part.parent / "key.json").read_text()), 16, encoder.embed_dim, False
    )
    for place in rng.integers(0, len(whole) * 8, 300):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << (place % 8)
        part.write_bytes(damaged)
        with pytest.raises(BadInput, match="000000.parquet: is damaged: remove it and start the same command again"):
            list(table._groups())
    for cut in (0, 7, len(whole) - 1):
        part.write_bytes(whole[:cut])
        with pytest.raises(BadInput, match="is damaged"):
            list(table._groups())
    part.write_bytes(whole)
    assert len(next(table._groups())[0]) > 0


@pytest.mark.parametrize("content", ["{", "[]", "5", "{}", "\0\0"])
def test_a_torn_key_of_parts_is_named(content: str, scans: Path, encoder: Encoder, tmp_path: Path) -> None:
    run(scans, encoder, tmp_path / "f.parquet", shard=(1, 3))
    (tmp_path / "f.parts" / "key.json").write_text(content)
    with pytest.raises(BadInput, match=r"f\.parts.*(remove|choose another)"):
        run(scans, encoder, tmp_path / "f.parquet")


def test_a_part_that_says_nothing_is_damaged_and_a_fault_of_ours_is_not(
    scans: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(scans, encoder, tmp_path / "f.parquet", shard=(1, 3))
    part = tmp_path / "f.parts" / "000000.parquet"
    table = EmbeddingTable(
        tmp_path / "f.parquet", json.loads((part.parent / "key.json").read_text()), 16, encoder.embed_dim, False
    )
    body = part.read_bytes()[: -len(embed_table._checksum(b""))]
    rows = pq.read_table(pa.BufferReader(body))
    for metadata in ({}, {embed_table.META: b"[]"}, {embed_table.META: b'{"set_aside": 3}'}):
        sink = pa.BufferOutputStream()
        pq.write_table(rows.replace_schema_metadata(metadata), sink)
        other = sink.getvalue().to_pybytes()
        part.write_bytes(other + embed_table._checksum(other))
        with pytest.raises(BadInput, match="000000.parquet: is damaged"):
            list(table._groups())

    def broken(content: bytes) -> bytes:
        raise TypeError("of our own")

    monkeypatch.setattr(embed_table, "_checked", broken)
    with pytest.raises(TypeError, match="of our own"):
        list(table._groups())
