"""Retrieval of similar scans: the neighbours of brute force, filters, the page and the CSV, and what is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.retrieve import answer
from benchmarks.retrieve import write_table as write_many
from dinov2.cli import main
from dinov2.errors import BadInput
from dinov2.features.retrieval import index as index_module
from dinov2.features.retrieval.index import neighbours, open_index
from dinov2.features.retrieval.table import FeatureTable, rows_left
from tests.unit.features.retrieval.tables import hits, write_scan, write_table


def some_vectors(n: int, width: int = 24, seed: int = 0) -> np.ndarray:
    """Alike, as features of scans of one kind are: cosines near 1."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=width) * 3 + rng.normal(size=(n, width)) * 0.3


def exact(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return 1 - unit @ (query / np.linalg.norm(query))


def assert_is_row_3(found: np.ndarray, vectors: np.ndarray) -> None:
    np.testing.assert_allclose(found, vectors[3] / np.linalg.norm(vectors[3]), atol=5e-4)


def test_neighbours_are_those_of_brute_force_up_to_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several blocks, with some rows left out, among vectors whose cosines are all near 1."""
    monkeypatch.setattr(index_module, "ROWS_PER_BLOCK", 100)
    vectors, query = np.split(some_vectors(501), [500])
    index = open_index(FeatureTable(write_table(tmp_path / "f.parquet", vectors)), "cls")
    assert isinstance(index, np.memmap) and index.dtype == np.float16
    rows = np.delete(np.arange(500), slice(120, 160))
    found, distances = neighbours(index, query[0], 9, rows)
    wanted = exact(vectors, query[0])
    best = rows[np.argsort(wanted[rows])][:9]
    rounding = np.sqrt(2 * wanted[best]) * 2**-11 + 1e-6  # half a squared distance, of vectors that are off by 2^-11
    assert (np.abs(distances - wanted[found]) < rounding).all()
    assert (np.abs(wanted[found] - wanted[best]) < 2 * rounding).all()  # two that lie so near may change places
    assert found[0] == best[0] and not set(found) & set(range(120, 160)) and (np.diff(distances) >= 0).all()


def test_an_index_is_made_once_and_anew_for_another_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = index_module._unit_vectors
    monkeypatch.setattr(index_module, "_unit_vectors", lambda table, column: (made.append(column), make(table, column))[1])
    path = write_table(tmp_path / "f.parquet", some_vectors(70))
    for column in ("cls", "pooled", "cls"):
        open_index(FeatureTable(path), column)
    os.utime(path, (1, 1))  # copied: another time, the same bytes
    assert len(open_index(FeatureTable(path), "cls")) == 70 and made == ["cls", "pooled"]
    (kept,) = (tmp_path / "f.index").glob("cls-*.npy")
    kept.write_bytes(kept.read_bytes()[:200])  # cut short
    assert_is_row_3(open_index(FeatureTable(path), "cls")[3], some_vectors(70))
    write_table(path, some_vectors(70, seed=1))
    assert_is_row_3(open_index(FeatureTable(path), "cls")[3], some_vectors(70, seed=1))
    assert made == ["cls", "pooled", "cls", "cls"]
    assert len(list((tmp_path / "f.index").glob("cls-*.npy"))) == 1, "the older one is of no use"


def test_an_index_that_cannot_be_kept_is_said_and_made_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_table(tmp_path / "f.parquet", some_vectors(5))
    (tmp_path / "f.index").write_text("in the way")
    assert open_index(FeatureTable(path), "cls").shape == (5, 24)
    assert "the index cannot be kept" in caplog.text


def test_filters_leave_the_rows_that_were_asked_for(tmp_path: Path) -> None:
    facts = {
        "patient": ["a", "a", "b", None, "b"],
        "modality": ["CT", "MR", "MR", "MR", "CT"],
        "organ": [*["lung"] * 4, "liver"],
    }
    table = FeatureTable(write_table(tmp_path / "f.parquet", some_vectors(5), **facts))
    assert rows_left(table, [], [], 1).tolist() == [0, 2, 3, 4]
    assert rows_left(table, ["modality=MR"], ["patient"], 0).tolist() == [2, 3], "one of no known patient may be another's"
    assert rows_left(table, ["modality=MR", "organ=lung"], [], None).tolist() == [1, 2, 3]
    for where, same, row, words in (
        (["modalty=MR"], [], 0, r"no column 'modalty' \(did you mean 'modality'\?\)"),
        (["modality"], [], 0, "write it as column=value"),
        (["organ=livr"], [], 0, r"no scan is left \(did you mean 'liver'\?\)"),
        (["organ=liver"], ["patient"], 2, "--exclude-same patient: no scan is left"),
        ([], ["patient"], 3, "row 3, which has none, so its patient is not known"),
        ([], ["patient"], None, "the query is no row of the table"),
    ):
        with pytest.raises(BadInput, match=words):
            rows_left(table, where, same, row)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Four scans in a folder of a name with a tag in it, a table beside them; the last one's file is gone."""
    folder = tmp_path / "<b>scans"
    folder.mkdir()
    for i in range(3):
        write_scan(folder / f"{i}.nii", seed=i)
    vectors = np.array([[1, 0, 0], [1, 1, 0], [1, 0.2, 0], [1, 0, 0.5]])
    write_table(folder / "f.parquet", vectors, patient=["p<i>", "q", "r", "s"])
    return folder


def test_hits_are_listed_by_distance_on_a_page_that_opens_offline_and_in_a_table(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name is text, whatever is in it, and a scan whose file is gone is a hit all the same."""
    words = ["retrieve", str(scans / "f.parquet"), "--query", str(scans / "0.nii"), "-k", "3"]
    words += ["--output", str(tmp_path / "h.html")]
    assert main(words) == 0
    found = hits(tmp_path / "h.csv")
    assert [row["row"] for row in found] == ["2", "3", "1"]
    wanted = exact(np.array([[1, 0.2, 0], [1, 0, 0.5], [1, 1, 0]]), np.array([1.0, 0, 0]))
    np.testing.assert_allclose([float(row["distance"]) for row in found], wanted, atol=1e-3)
    assert found[0]["path"] == str(scans / "2.nii") and (found[0]["x"], found[0]["rank"]) == ("", "1")
    page = (tmp_path / "h.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and page.count("picture missing") == 1
    assert "p&lt;i&gt;" in page and "<i>" not in page and "<b>scans" not in page
    assert "http" not in page and "src=" in page and 'name="viewport"' in page
    assert "scan 2" in capsys.readouterr().out
    assert main([*words, "--features", "pooled", "--where", "patient=q"]) == 0, "fewer than -k are left, which is said"
    assert len(hits(tmp_path / "h.csv")) == 1 and "only 1 hits for -k 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["--query", "4"], "has the rows 0 to 3"),
        (["--query", "-1"], "has the rows 0 to 3"),
        (["--query", "none.nii"], "no such scan, and no row"),
        (["--query", "twice"], "2 rows have this id: give a number, such as 1, 2"),
        (["--query", "new.nii"], "does not say by which weights it was made"),
        (["-k", "5"], "-k 5: .*f.parquet has 4 scans"),
        (["-k", "0"], "-k 0"),
        (["--where", "patients=q"], "did you mean 'patient'"),
        (["--output", "h.csv"], "give a name that ends in .html"),
        (["--output", "none/h.html"], "there is no folder none"),
        (["--features", "pooled", "--query", "0"], "row 2 .scan 2. are not finite or all zero"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_scan(tmp_path / "new.nii")
    vectors = np.eye(4)
    vectors[2] = np.nan if "pooled" in words else 1
    write_table(tmp_path / "f.parquet", vectors, patient=list("pqrs"))
    if "twice" in words:
        table = pq.read_table("f.parquet")
        pq.write_table(table.set_column(0, "id", [["a", "twice", "twice", "b"]]), "f.parquet")
    assert main(["retrieve", "f.parquet", "--query", "0", "-k", "1", "--output", "h.html", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line), line
    assert not (tmp_path / "h.html").exists() and not (tmp_path / "h.csv").exists()


def test_an_answer_among_ten_thousand_scans_takes_a_tenth_of_a_second(tmp_path: Path) -> None:
    """Seconds of the processor, once the index is there; `benchmarks/retrieve.py` has 100,000."""
    write_many(tmp_path / "f.parquet", 10_000, 64)
    answer(tmp_path / "f.parquet", 0, ([], []))
    answers = [answer(tmp_path / "f.parquet", 1234, (["modality=PET"], ["patient"])) for _ in range(3)]
    assert min(cpu_s for *_, cpu_s in answers) < 0.1
    for found, *_ in answers:
        assert len(found) == 5 and (found % 4 == 2).all() and not (found // 10 == 123).any()
