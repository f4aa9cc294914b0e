"""A refusal is one line, whatever is in the names and files that it is about."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from dinov2.configs import load_and_merge_config_3d
from dinov2.configs.errors import ConfigError
from dinov2.data import read_datalist
from dinov2.errors import BadInput, BadVolume


def test_what_would_break_a_line_or_a_terminal_is_an_escape() -> None:
    assert str(BadVolume("a\nb \x1b[2J c\u2028d \udcff é: no")) == "a\\nb \\x1b[2J c\\u2028d \\udcff é: no"
    again = pickle.loads(pickle.dumps(BadVolume("a\nb", "axes")))
    assert (str(again), again.reason) == ("a\\nb", "axes")


def test_what_is_nested_thousands_deep_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(BadInput, match=r"deep.json is not valid JSON"):
        read_datalist(tmp_path / "deep.json")
    (tmp_path / "deep.yaml").write_text("[" * 3000)
    with pytest.raises(ConfigError, match=r"deep.yaml: not a readable YAML file"):
        load_and_merge_config_3d(tmp_path / "deep.yaml")
    with pytest.raises(ConfigError, match="overrides"):
        load_and_merge_config_3d(None, ["train.seed=" + "[" * 3000 + "]" * 3000])
