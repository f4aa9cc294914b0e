"""A long command is heard in a log too: at most a line a minute, with speed and time left."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from dinov2.cli import main
from dinov2.logging import progress as module
from dinov2.logging.progress import Progress, in_words, track
from tests.conftest import ROOT
from tests.unit.data.corpus.test_index import save_nifti, scan


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO, "dinov2")
    return caplog


def said(lines: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in lines.records if r.name == module.__name__]
    lines.clear()
    return found


def test_a_line_a_minute_with_speed_and_time_left(lines: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with Progress(2000, "iterations", clock=clock) as progress:
        for _ in range(119):
            clock.now += 0.5
            progress.update()
        assert said(lines) == []  # 59.5 s
        clock.now += 0.5
        progress.update()
        assert said(lines) == ["iterations: 120 of 2000, 2.0/s, 16 min left"]
        for _ in range(119):
            clock.now += 0.5
            progress.update()
        assert said(lines) == []
        clock.now += 30.5
        progress.update(note="3 bad")
        assert said(lines) == ["iterations: 240 of 2000, 1.6/s, 18 min left, 3 bad"]
        assert progress.done == 240


def test_what_ends_within_a_minute_is_quiet_and_the_end_is_no_news(lines: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    for seconds in (59.0, 600.0):
        with Progress(2, "scans", clock=clock) as progress:
            progress.update()
            clock.now += seconds
            progress.update()
        assert said(lines) == []


def test_what_an_earlier_run_did_is_counted_and_has_no_part_in_the_speed(lines: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    progress = Progress(1000, "scans", done=900, clock=clock)
    clock.now += 120
    progress.update(10)
    assert said(lines) == ["scans: 910 of 1000, 12 s each, 18 min left"]


def test_times_are_in_the_units_that_one_waits_in() -> None:
    found = [in_words(s) for s in (0.2, 89, 91, 89 * 60, 3 * 3600 + 600, 47 * 3600, 60 * 3600)]
    assert found == ["0 s", "89 s", "2 min", "89 min", "3 h 10 min", "47 h 0 min", "2.5 days"]


def test_items_are_counted_when_they_are_done(lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PERIOD_S", 0.0)
    seen = []
    for item in track("abc", "letters"):
        seen.append((item, [re.sub(r"\d of 3.*", "", line) for line in said(lines)]))
    assert seen == [("a", []), ("b", ["letters: "]), ("c", ["letters: "])]


@pytest.mark.parametrize("has_bar", [True, False])
def test_a_terminal_has_a_bar_or_the_commands_own_output_and_no_lines(
    lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has_bar: bool
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(module, "PERIOD_S", 0.0)
    for _ in track("abc", "letters", has_bar=has_bar):
        pass
    assert said(lines) == [] and ("letters: 100%" in capsys.readouterr().err) == has_bar


def test_commands_are_heard_in_a_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "PERIOD_S", 0.0)
    for i in range(20):
        save_nifti(tmp_path / "data" / f"{i:02}.nii.gz", scan(i))
    found, cache = tmp_path / "list.json", tmp_path / "cache"
    index = ["index", str(tmp_path / "data"), "--output", str(found), "--workers", "0"]
    build = ["cache", "build", str(found), "--cache-dir", str(cache), "--workers", "0"]
    verify = ["cache", "verify", str(found), "--cache-dir", str(cache)]
    embed = ["embed", str(found), "--weights", "demo", "--output", str(tmp_path / "f.parquet"), "--workers", "0"]
    for command, words in (
        (index, ["files and series: 8 of 20"]),
        (build, ["volumes: 9 of 20"]),
        (verify, ["entries: 1 of 20", "cached volumes: 1 of 20"]),
        ([*embed, "--mode", "resize", "--size", "16", "--device", "cpu"], ["scans: 1 of 20"]),
    ):
        assert main(command) == 0
        heard = capsys.readouterr().err
        assert all(re.search(rf"I dinov2\.logging\.progress: {word}, .* left", heard) for word in words), heard


def test_nothing_else_draws_bars() -> None:
    """Segmentation, probes and whatever comes later say how far they are through the one helper."""
    files = [p for p in (ROOT / "dinov2").rglob("*.py") if re.search(r"\btqdm\b", p.read_text(encoding="utf-8"))]
    assert [p.relative_to(ROOT).as_posix() for p in files] == ["dinov2/logging/progress.py"]
