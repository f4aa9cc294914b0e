"""The `dinov2` command hands sub-commands on to the programs."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

import pytest

from dinov2.cli import PROGRAMS, main

FILES = {
    "train": "train/train3d.py",
    "segment": "eval/segmentation3d.py",
    "linear": "eval/linear3d.py",
    "knn": "eval/knn.py",
    "logistic": "eval/log_regression.py",
    "ridge": "eval/regression.py",
}
EVALUATIONS = [name for name in FILES if name != "train"]


@pytest.mark.parametrize("name", FILES)
def test_a_programs_help_is_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = importlib.import_module("dinov2." + FILES[name].removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0 and capsys.readouterr().out == program.get_args_parser().format_help()
    assert PROGRAMS.keys() == FILES.keys()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_gets_all_words_and_its_exit_code_is_the_commands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(importlib.import_module(PROGRAMS[name][0]), "main", lambda words: given.append(words) or 75)
    assert main([name, "--output-dir", "o", "train.num_workers=0", "--help"]) == 75
    assert given == [["--output-dir", "o", "train.num_workers=0", "--help"]]


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_users_mistake_is_one_line_and_exit_code_2(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folders = ["--output-dir", str(tmp_path / "out"), "--base-data-dir", str(tmp_path)]
    assert main([name, "--pretrained-weights", "demo", "--dataset-name", "nowhere.yaml", *folders]) == 2
    said = capfd.readouterr().err
    assert "nowhere.yaml: no such recipe file" in said and said.count("\n") == 1 and not (tmp_path / "out").exists(), said


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_run_as_modules(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m dinov2.eval.segmentation3d --help`"""
    monkeypatch.setattr(sys, "argv", ["program", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(PROGRAMS[name][0], run_name="__main__")
    assert end.value.code == 0 and "usage: " in capsys.readouterr().out


def test_the_commands_help_names_every_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert not [name for name in (*PROGRAMS, "split") if f"  {name} " not in said]
