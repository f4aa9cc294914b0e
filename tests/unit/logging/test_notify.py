"""`train.notify`: told what happened, never waited for, its failure said once."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest

from dinov2.configs import load_and_merge_config_3d
from dinov2.configs.errors import ConfigError
from dinov2.configs.schema import notify_words
from dinov2.logging.notify import Notifier

WRITE = 'printf "%s|%s|%s|%s" "$DINOV2_EVENT" "$DINOV2_OUTPUT_DIR" "$DINOV2_MESSAGE" "$1" > "$2"'


def test_a_command_finds_what_happened_in_its_words_and_environment(tmp_path: Path) -> None:
    told = tmp_path / "told"
    notifier = Notifier(["sh", "-c", WRITE, "sh", '{"text": "{event}: {message}"}', str(told)], tmp_path)
    notifier.tell("warning", "50 % of 'it'; $HOME")
    notifier.close()
    assert told.read_text() == f"""warning|{tmp_path}|50 % of 'it'; $HOME|{{"text": "warning: 50 % of 'it'; $HOME"}}"""


@pytest.mark.parametrize(
    "words, problem",
    [
        (["/no/such/program"], "cannot be started: No such file"),
        (["sh", "-c", "echo why >&2; exit 7"], "ended with 7: why"),
        (["sleep", "30"], "took more than 0 s and was killed"),
    ],
)
def test_a_command_that_fails_or_hangs_is_said_once_and_not_waited_for(
    words: list[str], problem: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier(words, tmp_path, time_s=0.3)
    start = time.monotonic()
    for event in ("warning", "warning", "end"):
        notifier.tell(event, "")
    assert time.monotonic() - start < 0.2
    with caplog.at_level(logging.WARNING):
        notifier.close()
    assert [problem in r.getMessage() and "the run goes on" in r.getMessage() for r in caplog.records] == [True]


def test_a_run_that_has_ended_waits_a_little_and_leaves_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier(["sleep", "2"], tmp_path)
    notifier.tell("end", "")
    start = time.monotonic()
    notifier.close(patience_s=0.1)
    assert time.monotonic() - start < 1 and "left to itself" in caplog.text


@pytest.mark.parametrize(
    "value, words",
    [
        ("", []),
        ("mail -s 'a run' me@x.org", ["mail", "-s", "a run", "me@x.org"]),
        ("[curl, -d, '{event}', x]", ["curl", "-d", "{event}", "x"]),
    ],
)
def test_a_command_is_a_text_or_its_words(value: str, words: list[str]) -> None:
    assert notify_words(load_and_merge_config_3d(None, [f"train.notify={value}"]).train.notify) == words


@pytest.mark.parametrize("value", ["mail 'me", "5", "[1, 2]", "true"])
def test_what_is_no_command_is_refused_before_anything_runs(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"train\.notify="):
        load_and_merge_config_3d(None, [f"train.notify={value}"])
