"""A run's records after a torn write: named with what to do, never a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dinov2.errors import BadInput
from dinov2.eval.run import _identity_of
from dinov2.logging.metrics import MetricWriter, read_metrics
from dinov2.train.state import check_same_run

TORN = [b"", b"{", b"{}", b"[]", b"5", b"null", b"\0\0\0", b"\xff\xfe{}", b"[" * 100_000]


@pytest.mark.parametrize("content", [*TORN, b'{"effective_batch": "4", "datalist_sha256": "a"}', b'{"effective_batch": 4}'])
def test_a_torn_run_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"run\.json.*use --no-resume, or move it away") as refusal:
        check_same_run(tmp_path, "a" * 64, 4, 1, allow_changed=False)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [*TORN, b'{"config": 5}'])
def test_a_torn_decisive_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "decisive.json").write_bytes(content)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(BadInput, match=r"decisive\.json.*use another --output-dir, or --no-resume"):
        _identity_of(tmp_path)


@pytest.mark.parametrize("line", [b"{}", b"[]", b"5", b'{"iteration": "1"}', b'{"iteration": NaN}', b"\xff", b"[" * 100_000])
def test_a_damaged_line_of_metrics_is_named_and_a_cut_one_is_left_out(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "training_metrics.json"
    rows = [json.dumps({"iteration": i, "loss": 0.5}).encode() for i in range(3)]
    path.write_bytes(b"\n".join([rows[0], line, rows[2]]) + b"\n")
    with pytest.raises(BadInput, match=r"training_metrics\.json, line 2: is damaged.*move the file away"):
        MetricWriter(tmp_path, 3)
    path.write_bytes(b"\n".join(rows) + b"\n" + line[:1])
    assert [row["iteration"] for row in read_metrics(path)] == [0, 1, 2]
