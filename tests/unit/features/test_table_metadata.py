"""What a file says of itself was written by anyone: three commands read it, and refuse in one line what it cannot be."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2.errors import BadInput
from dinov2.eval.crossval.tables import read_embeddings
from dinov2.features.embed_table import META, EmbeddingTable
from dinov2.features.retrieval.table import FeatureTable

COLUMNS = ("id", "path", "channel", "patient", "sha", "cls", "pooled")


def kept(path: Path) -> None:
    table = EmbeddingTable.__new__(EmbeddingTable)
    table.output = path
    table._check_table()


@pytest.mark.parametrize("says", [b"[" * 200_000, b"[]", b"{", b"\xff"], ids=["too deep", "a list", "cut off", "no text"])
@pytest.mark.parametrize("read", [read_embeddings, FeatureTable, kept])
def test_metadata_that_cannot_be_is_refused_in_a_line(read: object, says: bytes, tmp_path: Path) -> None:
    path = tmp_path / "feats.parquet"
    pq.write_table(pa.table({name: ["a"] for name in COLUMNS}).replace_schema_metadata({META: says}), path)
    with pytest.raises(BadInput, match="Parquet file") as err:
        read(path)  # type: ignore[operator]
    assert "\n" not in str(err.value)


@pytest.mark.parametrize("read", [read_embeddings, FeatureTable])
def test_a_lack_of_memory_is_no_fault_of_the_file(read: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow's error for it is one of its own, as those for damaged files are, and Python's."""

    def without_room(*_args: object) -> object:
        raise pa.ArrowMemoryError("malloc of size 4294967296 failed")

    path = tmp_path / "feats.parquet"
    pq.write_table(pa.table({name: ["a"] for name in COLUMNS}), path)
    monkeypatch.setattr(pq, "read_table", without_room)
    monkeypatch.setattr(pq, "ParquetFile", without_room)
    with pytest.raises(MemoryError):
        read(path)  # type: ignore[operator]


@pytest.mark.parametrize("read", [read_embeddings, FeatureTable, kept])
def test_a_fault_of_ours_is_not_called_the_files(read: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_args: object, **_more: object) -> object:
        raise ValueError("a mistake in the code")

    path = tmp_path / "feats.parquet"
    pq.write_table(pa.table({name: ["a"] for name in COLUMNS}), path)
    for module in ("eval.crossval.tables", "features.embed_table", "features.retrieval.table"):
        monkeypatch.setattr(f"dinov2.{module}.about_table", wrong)
    with pytest.raises(ValueError, match="a mistake in the code"):
        read(path)  # type: ignore[operator]


@pytest.mark.parametrize(
    "cls",
    [
        pa.array([[1.0, 2.0], [1.0]]),
        pa.array([[1.0, 2.0], None]),
        pa.array([[{"a": 1.0}], [{"a": 1.0}]]),
        pa.array(["a", "b"]),
    ],
    ids=["lengths", "none", "structs", "text"],
)
def test_columns_that_are_no_features_are_refused_in_a_line(cls: pa.Array, tmp_path: Path) -> None:
    path = tmp_path / "feats.parquet"
    columns = {name: pa.array(["a", "b"]) for name in COLUMNS} | {"cls": cls, "pooled": pa.array([[1.0], [2.0]])}
    pq.write_table(pa.table(columns).replace_schema_metadata({META: b'{"key": {}}'}), path)
    with pytest.raises(BadInput, match="another kind|differ in length"):
        read_embeddings(path)


def test_text_that_is_none_is_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "feats.parquet"
    no_text = pa.Array.from_buffers(pa.utf8(), 1, pa.array([b"\xff"], pa.binary()).buffers())
    columns = {name: no_text for name in COLUMNS} | {"cls": pa.array([[1.0]]), "pooled": pa.array([[1.0]])}
    pq.write_table(pa.table(columns).replace_schema_metadata({META: b'{"key": {}}'}), path)
    with pytest.raises(BadInput, match="Parquet file"):
        read_embeddings(path)
