"""What programs do not import when they start, in fresh processes: torch without a network, its heavy parts without a need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.unit.features.retrieval.tables import write_table

RUN = """
import resource, sys
import dinov2_3d
sys.argv = ["dinov2", *sys.argv[1:]]
try:
    code = dinov2_3d.main()
except SystemExit as err:
    code = err.code
heavy = sorted({"torch", "monai", "tensorboard"} & sys.modules.keys())
used = resource.getrusage(resource.RUSAGE_SELF)
print("\\nHEAVY", code, ",".join(heavy), used.ru_utime + used.ru_stime)
"""


def started(folder: Path, *arguments: str) -> tuple[int, str, float]:
    """Exit code, heavy modules in the process, and its CPU seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert "HEAVY" in done.stdout, done.stderr
    assert "numexpr" not in done.stderr, "of pandas, it speaks of its threads to whoever splits a table"
    code, *heavy, seconds = done.stdout.rsplit("HEAVY", 1)[1].split()
    return int(code), "".join(heavy), float(seconds)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans, label maps, and lists made by the commands under test."""
    folder = tmp_path_factory.mktemp("light")
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
        for i in range(5):
            voxels = rng.integers(0, 100 if kind == "images" else 2, (20, 18, 16)).astype(np.int16)
            nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 2.0, 1.0])), folder / kind / f"case{i}.nii.gz")
    for name, dice in (("one", "0.8"), ("other", "0.7")):
        (folder / f"{name}.csv").write_text(f"case,class,dice\na,ball,{dice}\nb,ball,0.9\n")
    write_table(folder / "f.parquet", np.eye(3))
    (folder / "table.csv").write_text("image,label\n" + "".join(f"images/case{i}.nii.gz,{i % 2}\n" for i in range(5)))
    (folder / "rules.yaml").write_text("seed: 0\nrules:\n  - {name: half, keep_share: 0.5}\n")
    (folder / "d.yaml").write_text("task: segmentation\nclasses: {0: outside, 1: inside}\n")
    (folder / "ridge").mkdir()
    (folder / "ridge" / "decisive.json").write_text("{}")
    (folder / "ridge" / "results.json").write_text('{"test_mae": 6.5}')
    (folder / "study.yaml").write_text(
        "base_data_dir: .\noutput_dir: study\ndatasets: {d: {recipe: d.yaml}}\nbudget: {disk_gib: 0.001}\n"
        "methods: {3DINO: {weights: demo}, Random: }\n"
    )
    (folder / "run").mkdir()
    (folder / "run" / "training_metrics.json").write_text('{"iteration": 0, "total_loss": 5.0}\n')
    return folder


COMMANDS = [
    ["--help"],
    ["--version"],
    ["config", "show", "pretrain/tiny_cpu"],
    ["config", "check", "pretrain/tiny_cpu"],
    ["watch", "run", "--once"],
    ["index", "images", "--output", "list.json", "--workers", "2", "--report", "report.html"],
    ["index", "list.json", "--merge", "--output", "merged.json"],
    ["curate", "list.json", "--rules", "rules.yaml", "--output", "curated.json"],
    ["overlap", "list.json", "list.json"],
    ["cache", "build", "list.json", "--cache-dir", "cache", "--workers", "2"],
    ["cache", "verify", "list.json", "--cache-dir", "cache"],
    ["cache", "stats", "list.json", "--cache-dir", "cache"],
    ["split", "--images", "images", "--labels", "labels", "--output", "d_100_datalist.json"],
    ["study", "plan", "study.yaml"],
    ["study", "status", "study.yaml"],
    ["study", "collect", "study.yaml"],
    ["study", "report", "study.yaml"],
    ["split", "--table", "table.csv", "--output", "d_cls_datalist.json"],
    ["split", "--folds", "3", "--images", "images", "--labels", "labels", "--output", "d_100_datalist.json"],
    ["retrieve", "f.parquet", "--query", "0", "-k", "1", "--output", "hits.html"],
    ["compare", "one.csv", "other.csv", "--output", "compared"],
    ["report", "ridge"],
]


def test_commands_that_need_no_network_import_no_torch(folder: Path) -> None:
    codes: dict[str, int] = {}
    for command in COMMANDS:
        code, heavy, _ = started(folder, *command)
        assert not heavy, f"dinov2 {' '.join(command)} imported {heavy}"
        codes[" ".join(command[:2])] = code
    assert {name for name, code in codes.items() if code} == {
        "overlap list.json",
        "study collect",
    }  # something is shared; not run
    assert len(json.loads((folder / "list.json").read_text())) == 5


START = """
import gc, runpy, sys
before = gc.get_threshold()
import dinov2, dinov2.cli
assert gc.get_threshold() == before, "a setting of the whole process is no library's"
sys.argv = ["train3d.py", "--help"]
try:
    runpy.run_path("dinov2/train/train3d.py", run_name="__main__")
except SystemExit:
    from dinov2.start import THRESHOLDS
    import atexit
    atexit._run_exitfuncs()
    print("STARTED", gc.get_threshold() == THRESHOLDS != before, gc.get_freeze_count() > 1000)
"""


def test_a_program_sets_the_collector_and_an_import_does_not() -> None:
    done = subprocess.run([sys.executable, "-c", START], cwd=ROOT, capture_output=True, text=True)
    assert "STARTED True True" in done.stdout, done.stdout[-200:] + done.stderr


def test_what_reads_weights_starts_without_checkpoint_folders_and_the_compiler() -> None:
    code = "import sys, dinov2.eval.knn, dinov2.features.encoder; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch.distributed.checkpoint", "torch._dynamo", "sympy", "monai"} & set(done.stdout.split())


def test_help_takes_less_than_half_a_second_of_cpu(folder: Path) -> None:
    assert min(started(folder, "--help")[2] for _ in range(3)) < 0.5
