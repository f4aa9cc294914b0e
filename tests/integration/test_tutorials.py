"""What the tutorials and the notebook tell a reader to type is run, word for word but smaller, in one folder and this process.

A block with a title is not run: one that is named as a file (`title="heads.yaml"`) is that file, of any other
(`title="needs SLURM"`) the flags and configuration keys are looked up.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from omegaconf import OmegaConf

from dinov2.cli import main
from dinov2.configs import load_and_merge_config_3d
from dinov2.demo import practice
from dinov2.models import build_backbone
from tests.conftest import ROOT, SMALL

DOCS = ROOT / "docs"
PAGES = ("quick_start", *(f"tutorials/{name}" for name in (
    "index", "features", "probe", "segment", "compare", "from_3dino", "pretrain", "data_set", "method", "slurm", "paper",
)))  # fmt: skip
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
WITH_PARTS = {"study", "recipe", "config", "cache", "checkpoint"}
SEGMENT = "--epochs 1 --epoch-length 2 --eval-iters 2 --warmup-iters 1 --batch-size 1 --num-workers 0"
SMALLER = {  # further words of a command; of a flag that is given twice the last one counts
    "embed": "--workers 0",
    "index": "--workers 0",
    "probe": "--folds 3 --repeats 1 --no-scans",
    "segment": f"{SEGMENT} --opts train.num_threads=1",
    "compare": "--no-figures",
    "train": " ".join([*SMALL, "optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=2"]),
}


class Block(NamedTuple):
    page: str
    language: str
    title: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [shlex.split(line, comments=True) for line in lines if line.strip()]


def blocks() -> Iterator[Block]:
    for page in PAGES:
        for language, title, text in BLOCK.findall((DOCS / f"{page}.md").read_text(encoding="utf-8")):
            yield Block(page, language, title, text)


def test_the_commands_and_programs_of_the_tutorials_run_in_the_order_of_the_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(practice, "write_practice", partial(practice.write_practice, num_people=12, spacing_mm=8.0))
    weights_of_3dino(tmp_path)
    ran = 0
    for block in blocks():
        if "." in block.title:
            (tmp_path / block.title).write_text(block.text)
        elif block.title:
            continue
        elif block.language == "python":
            exec(compile(block.text, block.page, "exec"), {})
        else:
            for words in block.commands:
                assert words[0] == "dinov2", (block.page, words)
                code = main([*words[1:], *SMALLER.get(words[1], "").split()])
                assert code == 0, (block.page, words, capfd.readouterr())
        ran += 1
    assert ran > 25
    made = ["pictures/viewer.html", "probe/results.json", "seg/best_model.pth", "comparison/comparison.csv"]
    made += ["predicted/person10.nii.gz", "recipe_check", "DATA/heads_cls_datalist.json"]
    assert [name for name in made if not (tmp_path / name).exists()] == []


def weights_of_3dino(folder: Path) -> None:
    """A configuration and weights in the published layout, of a few thousand parameters."""
    (folder / "my_3dino.yaml").write_text(OmegaConf.to_yaml(OmegaConf.from_dotlist(SMALL)))
    torch.manual_seed(0)
    state = build_backbone(load_and_merge_config_3d(folder / "my_3dino.yaml")).state_dict()
    torch.save({"teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}}, folder / "teacher_checkpoint.pth")


def test_what_is_not_run_has_flags_keys_and_files_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    weights_of_3dino(tmp_path)
    titled = [block for block in blocks() if block.title and "." not in block.title]
    assert len(titled) > 8
    for words in (words for block in titled for words in block.commands):
        if words[0] in ("source", "pip"):
            continue
        if words[0].startswith("scripts/"):
            assert (ROOT / words[0]).is_file()
            continue
        said = help_of(words, capsys)
        unknown = [word for word in words if word.startswith("--") and not re.search(rf"{word}\b", said)]
        assert [word for word in unknown if word != "--nproc-per-node"] == [], words
        keys = [word for word in words if re.match(r"train\.\w+=", word)]
        if keys:
            load_and_merge_config_3d(words[words.index("--config-file") + 1] if "--config-file" in words else None, keys)


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command or program says of its flags."""
    capsys.readouterr()
    if words[0] == "dinov2":
        call = partial(main, [*words[1 : 3 if words[1] in WITH_PARTS else 2], "--help"])
    else:
        program = next(word for word in words if word.endswith(".py"))
        if program.startswith("scripts/"):
            return (ROOT / program).read_text()
        call = partial(importlib.import_module(program.removesuffix(".py").replace("/", ".")).main, ["--help"])
    with pytest.raises(SystemExit):
        call()
    return capsys.readouterr().out


def test_the_notebook_runs_from_top_to_bottom_and_has_no_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((DOCS / "notebooks" / "features.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        text = "".join(cell["source"]).replace("encoder(path)", "encoder(path, spacing=4)")  # an eighth of the patches
        exec(compile(text, cell["id"], "exec"), names)
    names["plt"].close("all")
    assert capsys.readouterr().out.count("mm") == 2 and names["colours"].shape[-1] == 3
