"""A refusal is one line, whatever is in the names and files that it is about."""

from __future__ import annotations

import argparse
import ast
import errno
import pickle
from pathlib import Path

import pytest
import torch

from dinov2.configs import load_and_merge_config_3d
from dinov2.configs.errors import ConfigError
from dinov2.data import read_datalist
from dinov2.errors import EXIT_BAD_INPUT, BadInput, BadVolume
from dinov2.program import run_program
from tests.conftest import ROOT


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


def _asks_for_too_much(kind: str) -> None:
    if kind == "torch":
        torch.empty(2**60, dtype=torch.uint8)
    elif kind == "python":
        bytearray(2**62)
    elif kind == "oneDNN":
        raise RuntimeError("could not create a primitive")
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


@pytest.mark.parametrize("kind", ["torch", "python", "oneDNN", "system"])
def test_a_machine_without_memory_is_one_line(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(lambda _: _asks_for_too_much(kind) or 0, argparse.ArgumentParser(), []) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no memory is left on this machine" in said and "make room" not in said


def test_another_error_of_torch_keeps_its_trace() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        run_program(lambda _: len(torch.ones(2) + torch.ones(3)), argparse.ArgumentParser(), [])


def test_every_exception_is_caught_in_the_one_place_that_the_architecture_names() -> None:
    found = set()
    for path in (ROOT / "dinov2").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            for handler in (node for node in ast.walk(function) if isinstance(node, ast.ExceptHandler)):
                caught = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else {"all"}
                if caught & {"all", "Exception", "BaseException"}:
                    found.add(f"{path.stem}.{function.name}")
    assert found == {"files.replacing"}
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## Errors")[2].partition("## Ranks")[0]
    assert all(f"{name}`" in text for name in found)
