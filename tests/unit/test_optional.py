"""Packages that an installation may lack: a command that needs one says so in a line, the others work without."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dinov2.errors import BadVolume
from dinov2.optional import EXTRAS, needed_for
from tests.conftest import ROOT
from tests.integration.test_segmentation3d import data as data
from tests.integration.test_segmentation3d import words

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~ ]", r)[0] for r in requirements if not r.startswith("dinov2-3d[")}


def test_each_optional_package_is_of_the_extra_that_its_line_names() -> None:
    extras = {extra: names(listed) for extra, listed in PROJECT["optional-dependencies"].items()}
    named: dict[str, set[str]] = {extra: set() for extra in extras}
    for package, extra in EXTRAS.items():
        named[extra].add(package)
    assert named == extras
    assert not names(PROJECT["dependencies"]) & set(EXTRAS)
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert everything == f"dinov2-3d[{','.join(e for e in extras if e not in ('cuda', 'all'))}]"


# one process without any of them: imports hidden from it, then commands, each with its code before it and a mark behind it
WITHOUT = """
import json, sys
from importlib.abc import MetaPathFinder

class Hide(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

HIDDEN, commands = json.loads(sys.argv[1]), json.loads(sys.argv[2])
sys.meta_path.insert(0, Hide())
import importlib, importlib.util
from dinov2.cli import main

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in HIDDEN else find(name, package)
for words in commands:
    run = importlib.import_module("dinov2.run.train.train").main if words[0] == "SLURM" else main
    code = run(words[1:] if words[0] == "SLURM" else words)
    sys.stderr.write(f"\\n== {code}\\n")
"""
NEEDS = {  # a command, and what it says
    "visualize SCANS/scan.nii.gz --weights demo --output OUT/pictures": "this command needs matplotlib",
    "report OUT": "this command needs matplotlib",
    "recipe check balls.yaml --base-data-dir OUT": "dinov2 recipe check needs matplotlib",
    "index SCANS --output OUT/list.json --report OUT/list.html": "--report needs matplotlib",
    "retrieve OUT/feats.parquet --query 0 --output OUT/hits.html": "the page of `dinov2 retrieve` needs matplotlib",
    "study report smoke": "a study's figures (without: --no-figures) needs matplotlib",
    "compare OUT SCANS --output OUT": "--output with figures (without: --no-figures) needs matplotlib",
    "demo --output OUT/demo": "the quick start without --data needs nilearn",
    "checkpoint export demo --onnx OUT/demo.onnx": "--onnx needs onnx",
    "index NRRD --output OUT/none.json --workers 0": "",
    "SLURM --output-dir OUT/run": "a SLURM job needs submitit",
}
WORK = ["doctor", "config check pretrain/tiny_cpu", "index SCANS --output OUT/all.json --workers 0"]
WORK += ["embed OUT/all.json --weights demo --device cpu --output OUT/feats.parquet --workers 0 --mode resize --size 8"]


def test_without_optional_packages_a_command_names_what_it_needs_and_the_others_work(data: Path, tmp_path: Path) -> None:
    scans, nrrd, out = (tmp_path / name for name in ("scans", "nrrd", "out"))
    for folder in (scans, nrrd, out):
        folder.mkdir()
    voxels = np.random.default_rng(0).normal(size=(18, 17, 16)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), scans / "scan.nii.gz")
    (nrrd / "scan.nrrd").write_text("NRRD0004\ntype: float\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n\n")
    (out / "training_metrics.json").write_text('{"iteration": 0}\n')
    places = {"SCANS": str(scans), "OUT": str(out), "NRRD": str(nrrd)}
    lines = [re.sub("|".join(places), lambda m: places[m[0]], line) for line in (*NEEDS, *WORK)]
    commands = [*map(str.split, lines), ["segment", *words(data, out / "seg", epochs=1, epoch_length=1, eval_iters=1)]]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps([*EXTRAS]), json.dumps(commands)], cwd=ROOT, capture_output=True, text=True
    )
    *said, end = result.stderr.split("== ")
    assert "Traceback" not in result.stderr and len(said) == len(commands), result.stderr
    codes = [int(text.split()[0]) for text in [*said[1:], end]]
    assert codes == [2] * len(NEEDS) + [0] * (len(WORK) + 1), result.stderr
    for text, line in zip(said, NEEDS.values(), strict=False):
        package = line.split()[-1] if line else "SimpleITK"
        assert f"pip install 'dinov2-3d[{EXTRAS[package]}]'" in text or not line, text
        assert line in text
    quarantined = (out / "none.quarantine.json").read_text()
    assert "SimpleITK, which is not installed: pip install 'dinov2-3d[dicom]'" in quarantined
    assert "pictures of cases are left out: matplotlib is not installed (pip install 'dinov2-3d[report]')" in said[-1]
    assert (out / "seg" / "results.json").exists() and not (out / "seg" / "worst").exists()
    assert (out / "feats.parquet").exists() and "SimpleITK" in result.stdout  # doctor's


def test_an_import_error_of_anything_else_stays_what_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"), needed_for("this"):
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401
    with (
        pytest.raises(BadVolume, match="^x needs SimpleITK, which cannot be imported \\(lib broken\\): pip install"),
        needed_for("x", BadVolume),
    ):
        raise ImportError("lib broken", name="SimpleITK")
