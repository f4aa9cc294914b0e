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


def test_a_lack_of_memory_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow's error for it is one of its own, as those for damaged files are, and Python's."""

    def without_room(*_args: object) -> object:
        raise pa.ArrowMemoryError("malloc of size 4294967296 failed")

    path = tmp_path / "feats.parquet"
    pq.write_table(pa.table({name: ["a"] for name in COLUMNS}), path)
    monkeypatch.setattr(pq, "read_table", without_room)
    with pytest.raises(MemoryError):
        read_embeddings(path)
