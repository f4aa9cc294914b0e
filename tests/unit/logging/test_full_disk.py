"""A disk that is full while metrics are written."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from dinov2.logging import MetricWriter


def test_a_full_disk_is_an_error_of_the_run_and_no_trace_of_tensorboards_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    printed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    outside = threading.excepthook
    with pytest.raises(OSError, match="No space left"), MetricWriter(tmp_path, 0) as metrics:
        monkeypatch.setattr(RecordWriter, "write", full)
        metrics.write({"iteration": 0, "loss": 1.0})
    assert not printed and threading.excepthook == outside


def test_other_threads_keep_their_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    with MetricWriter(tmp_path, 0):
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    assert len(printed) == 1
