"""The launcher on a real SLURM: submit two ranks, be asked to save, be queued again, resume, finish."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dinov2.run.data.index import main as index_main
from dinov2.run.train.train import main
from tests.conftest import BUNDLED, ROOT, Trainer
from tests.distributed.test_ranks import lines, metrics, run_ranks, teacher

HERE = Path(__file__).parent
missing = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name) is None]
needs_slurm = pytest.mark.skipif(
    bool(missing) or os.geteuid() != 0, reason=f"needs root and SLURM (missing: {', '.join(missing) or 'nothing'})"
)


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A one-node SLURM of this test's own."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    up = subprocess.run(["bash", HERE / "up.sh", folder, free_port(), free_port()], capture_output=True, text=True)
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
    finally:
        subprocess.run(["bash", HERE / "down.sh", folder])


def job_state(job: str) -> str:
    words = ["squeue", "-h", "-j", job, "-o", "%T %r"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def node_state() -> str:
    return subprocess.run(["sinfo", "-N", "-h", "-o", "%T %E"], capture_output=True, text=True).stdout.strip()


@needs_slurm
@pytest.mark.slow
def test_a_job_that_is_preempted_resumes_and_ends_as_an_undisturbed_one(slurm: None, trainer: Trainer, tmp_path: Path) -> None:
    words = ["train.OFFICIAL_EPOCH_LENGTH=60", "optim.epochs=2", "train.checkpoint_period=1000", "train.batch_size_per_gpu=2"]
    words += ["train.strategy=fsdp", "train.num_workers=1"]
    undisturbed = run_ranks(2, trainer, tmp_path / "whole", *words)
    assert undisturbed.returncode == 0, undisturbed.stderr
    out = tmp_path / "run"
    cluster = [
        "--nodes",
        "1",
        "--ngpus",
        "2",
        "--cpu",
        "--cpus-per-task",
        "1",
        "--mem",
        "2G",
        "--timeout",
        "20",
        "--partition",
        "debug",
    ]
    command = [sys.executable, "dinov2/run/train/train.py", *cluster, *trainer.command(out, *words)[2:]]
    submitted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert submitted.returncode == 0 and "submitted job" in submitted.stderr, submitted.stderr
    job = submitted.stderr.split("submitted job ")[1].split(";")[0]
    log = out / "slurm" / f"{job}_0_log.err"
    wait_until(lambda: lines(out) >= 5, job, log)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    wait_until(lambda: job_state(job).startswith("PENDING"), job, log)
    stopped_at = lines(out)
    assert 5 <= stopped_at < 120 and len(list((out / "checkpoints").iterdir())) == 1
    subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], check=True)
    wait_until(lambda: (out / "eval" / "training_119" / "teacher_checkpoint.pth").exists(), job, log)
    text = log.read_text()
    for sign in ("is queued again", f"iterations {stopped_at} to 119"):
        assert sign in text, text
    a, b = teacher(tmp_path / "whole", 119), teacher(out, 119)
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert metrics(out) == metrics(tmp_path / "whole")


def wait_until(condition, job: str, log: Path, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{job_state(job)}\n{node_state()}\n{log.read_text() if log.exists() else 'no log'}"
        time.sleep(0.1)


@needs_slurm
@pytest.mark.slow
def test_a_partition_that_is_not_there_is_named(slurm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--partition", "gpu-a100", "--cpu", "--ngpus", "1", "--output-dir", str(tmp_path / "run")]) == 2
    assert "SLURM refused the job: sbatch: error: invalid partition specified: gpu-a100" in capsys.readouterr().err


def test_a_machine_without_slurm_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--output-dir", str(tmp_path / "run")]) == 2
    assert "sbatch was not found" in capsys.readouterr().err
    assert main([]) == 2 and "--output-dir is needed" in capsys.readouterr().err


def test_dinov2s_spellings_ask_for_the_same_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr("dinov2.run.submit.submit", lambda *args: asked.append(args) or "1")
    own = ["--output-dir", str(tmp_path), "train.seed=1"]
    for words in ("--nodes 2 --ngpus 3", "--nnodes 2 --gpus-per-node 3", "--nnodes=2 --gpus 3 --use-volta32"):
        assert main([*words.split(), *own]) == 0
    assert [(program.argv, *rest) for program, _, _, *rest in asked] == [(own, 2, 3, False)] * 3
    assert capsys.readouterr().err.count("--use-volta32 has no effect: choose machines by --partition") == 1


@needs_slurm
@pytest.mark.slow
def test_an_index_as_an_array_is_merged_when_its_shards_are_done(slurm: None, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "list.json"
    data.mkdir()
    for path in BUNDLED.glob("*.nii.gz"):
        (data / path.name).write_bytes(path.read_bytes())
    (data / "broken.nii.gz").write_bytes(bytes(900))
    words = ["--shards", "2", "--cpus-per-task", "1", "--timeout", "5", str(data), "--output", str(out)]
    assert index_main(words) == 0
    deadline = time.monotonic() + 120
    while not out.with_name("list.quarantine.json").exists():
        assert time.monotonic() < deadline, subprocess.run(["squeue"], capture_output=True, text=True).stdout
        time.sleep(0.5)
    assert len(json.loads(out.read_text())) == 2 and len(json.loads(out.with_name("list.quarantine.json").read_text())) == 1
