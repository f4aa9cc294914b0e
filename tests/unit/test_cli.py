"""The `dinov2` command hands sub-commands on to the programs; paths at its doors."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dinov2.checkpointer.teacher import DEMO
from dinov2.cli import EXIT_PIPE, PROGRAMS, main
from dinov2.configs import load_and_merge_config_3d
from dinov2.data import read_datalist
from dinov2.errors import EXIT_OK
from dinov2.features.encoder import load_encoder
from tests.conftest import BUNDLED

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
    assert not [name for name in (*PROGRAMS, "split", "study") if f"  {name} " not in said]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and another folder to work in."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_a_tilde_is_the_home_folder_at_every_door(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(BUNDLED, home / "scans")
    assert main(["index", "~/scans", "--output=~/lists/l.json", "--report=~/r.html", "--workers=0"]) == 0
    image = sorted((home / "scans").glob("*.nii.gz"))[0].name
    (home / "own.json").write_text(json.dumps([{"image": f"~/scans/{image}", "shape": [91, 109, 91]}]))
    assert read_datalist("~/own.json").entries[0].image == str(home / "scans" / image)
    assert main(["cache", "build", "~/own.json", "--cache-dir=~/cache", "--workers=0"]) == 0
    (home / "c.yaml").write_text("train: {dataset_path: ~/own.json, output_dir: ~/run}\n")
    cfg = load_and_merge_config_3d("~/c.yaml", ["student.pretrained_weights=~/w.pth", "train.cache_dir=~/cache"])
    train = cfg.train
    assert train.dataset_path == f"{home}/own.json" and (train.output_dir, train.cache_dir) == (f"{home}/run", f"{home}/cache")
    assert cfg.student.pretrained_weights == f"{home}/w.pth"
    shutil.copy(DEMO, home / "w.safetensors")
    assert load_encoder("~/w.safetensors", "cpu").embed_dim > 0
    assert main(["checkpoint", "export", "~/w.safetensors", "~/w.pth"]) == 0 and (home / "w.pth").exists()
    assert not list(Path.cwd().iterdir()), "a folder of that name"
    capfd.readouterr()
    assert main(["train", "train.dataset_path=~/nowhere.json", "--output-dir=~/run"]) == 2
    assert f"{home}/nowhere.json" in capfd.readouterr().err and not list(Path.cwd().iterdir())


LONG = "n" * 300
OUTPUTS = {
    "index": ["index", "SCANS", "--workers", "0", "--output"],
    "report": ["index", "SCANS", "--workers", "0", "--output", "l.json", "--report"],
    "quarantine": ["index", "SCANS", "--workers", "0", "--output", "l.json", "--quarantine"],
    "curate": ["curate", "LIST", "--rules", "pretrain/curation/paper", "--output"],
    "embed": ["embed", "LIST", "--weights", "demo", "--device", "cpu", "--output"],
    "export": ["checkpoint", "export", "demo"],
    "doctor": ["doctor", "--report"],
    "split": ["split", "--images", "SCANS", "--labels", "SCANS", "--output"],
    "classify": ["classify", "--probe", "none.pth", "--input", "a.nii", "--output"],
}


@pytest.mark.parametrize("output", ["folder", "pipe", "", LONG, "file/below"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_is_no_file_is_refused_in_one_line(
    name: str, output: str, home: Path, real_list: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("folder").mkdir()
    Path("file").touch()
    os.mkfifo("pipe")
    given = {"SCANS": str(BUNDLED), "LIST": str(real_list)}
    assert main([*(given.get(w, w) for w in OUTPUTS[name]), output]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said, said
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["file", "folder", "pipe"]
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)


def test_two_outputs_of_one_name_are_refused(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for flag in ("--quarantine", "--report"):
        assert main(["index", str(BUNDLED), "--output", "l.json", flag, "./l.json"]) == 2
        assert "is --output too" in capfd.readouterr().err and not list(Path.cwd().iterdir())


def test_a_cache_of_nothing_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = [{"image": f"gone{i}.nii.gz", "shape": [20, 20, 20]} for i in range(3)]
    (tmp_path / "l.json").write_text(json.dumps(items))
    words = ["cache", "build", str(tmp_path / "l.json"), "--cache-dir", str(tmp_path / "c"), "--workers", "0"]
    assert main(words) == 2
    assert "0 volumes cached" in capsys.readouterr().out


@pytest.mark.parametrize("program", ["train.train", "data.index", "eval.embed", "eval.segmentation"])
@pytest.mark.parametrize("word", ["--comment=a\n#SBATCH --uid=0", "--job-name=a\rb", "--output-dir=x\ny"])
def test_a_launcher_refuses_a_word_of_several_lines(program: str, word: str, capfd: pytest.CaptureFixture[str]) -> None:
    launcher = importlib.import_module(f"dinov2.run.{program}")
    assert launcher.main(["--shards", "2", word]) == 2
    said = capfd.readouterr().err
    assert "has a line break" in said and said.count("\n") == 1, said


def test_a_name_with_a_line_break_is_still_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["curate", f"{tmp_path}/a\nb.json", "--rules", "pretrain/curation/paper", "--output", f"{tmp_path}/o"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("words", [["config", "show"], ["--help"], ["study", "plan", "smoke"]])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_enough_is_no_error(words: list[str], buffered: bool) -> None:
    """As `dinov2 ... | head`: its end of the pipe is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    flags = [] if buffered else ["-u"]
    with open(writing, "wb") as closed:
        done = subprocess.run(
            [sys.executable, *flags, "-m", "dinov2", *words], stdout=closed, stderr=subprocess.PIPE, text=True
        )
    # argparse itself passes over what it cannot print, not that of Debian 12's Python 3.11.2
    expected = {EXIT_OK, EXIT_PIPE} if words == ["--help"] else {EXIT_PIPE}
    assert done.returncode in expected and done.stderr == ""
