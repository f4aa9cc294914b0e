"""`dinov2 embed` as processes: killed, stopped and started again on real volumes, and as torchrun's ranks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from dinov2.cli import main
from dinov2.configs import load_and_merge_config_3d
from dinov2.configs.loader import without_path_keys
from dinov2.data import write_datalist
from dinov2.models import build_backbone
from tests.conftest import BUNDLED, ROOT
from tests.processes import environment, left_after, wait_for_children
from tests.started import Started

NUM_SCANS = 64  # four parts


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A third of a small network, whose parts still take longer than a test needs to see the first one."""
    words = ["student.arch=vit_tiny_3d", "student.depth=4", "student.patch_size=8", "student.block_chunks=0"]
    cfg = load_and_merge_config_3d(None, [*words, "crops.global_crops_size=32", "crops.local_crops_size=16"])
    torch.manual_seed(0)
    meta = {"config": without_path_keys(cfg)}
    torch.save({"teacher": build_backbone(cfg).state_dict(), "meta": meta}, tmp_path / "t.pth")
    return tmp_path / "t.pth"


def command(source: Path, weights: Path, output: Path, *flags: str) -> list[str]:
    words = [str(source), "--weights", str(weights), "--output", str(output), "--device", "cpu", *flags]
    return ["-m", "dinov2", "embed", *words]


def start(words: list[str], mark: str = "") -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, start_new_session=True, env=environment(mark), **pipes)


def finish(words: list[str]) -> str:
    process = start(words)
    said, problems = process.communicate(timeout=200)
    assert process.returncode == 0, problems
    return said


def wait_until_gone(group: int) -> None:
    """No process of the group is left."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("processes were left behind")


@pytest.mark.slow
def test_a_stopped_run_on_real_scans_continues_to_the_table_of_an_undisturbed_one(
    local_data: Path, weights: Path, tmp_path: Path
) -> None:
    """Killed, then stopped by SIGTERM, then left alone; a damaged file is among the scans."""
    (tmp_path / "data").mkdir()
    files = [*sorted(local_data.glob("hippocampus/images/*.nii.gz"))[: NUM_SCANS - 3], *BUNDLED.glob("*.nii.gz")]
    for file in files:
        (tmp_path / "data" / file.name).symlink_to(file)
    (tmp_path / "data" / "broken.nii.gz").write_bytes(files[0].read_bytes()[:2000])
    items = [{"image": str(path), "shape": [1, 1, 1]} for path in sorted((tmp_path / "data").iterdir())]
    write_datalist(tmp_path / "list.json", items)
    flags = ("--mode", "sliding_window", "--overlap", "0", "--patch-tokens", "--workers", "2")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert main(command(tmp_path / "list.json", weights, tmp_path / "a" / "f.parquet", *flags, "--workers", "0")[2:]) == 0
    parts, counts = tmp_path / "b" / "f.parts", []
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
        before = len(list(parts.glob("0*.parquet")))
        process = Started(command(tmp_path / "list.json", weights, tmp_path / "b" / "f.parquet", *flags)[2:], "dinov2.cli")
        deadline = time.monotonic() + 100
        while len(list(parts.glob("0*.parquet"))) == before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        if number == signal.SIGKILL:  # the main process alone: the others end by themselves
            process.kill()
        else:
            os.killpg(process.pid, number)
        assert process.wait(60) == code
        wait_until_gone(process.pid)
        counts.append(len(list(parts.glob("0*.parquet"))))
        assert not (tmp_path / "b" / "f.parquet").exists()
    assert 0 < counts[0] < counts[1] < 4
    assert main(command(tmp_path / "list.json", weights, tmp_path / "b" / "f.parquet", *flags)[2:]) == 0
    for name in ("f.parquet", "f.quarantine.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    patches = pq.read_table(tmp_path / "b" / "f.parquet")["patches"].to_pylist()
    assert len(patches) == NUM_SCANS - 1 and all((tmp_path / "b" / name).exists() for name in patches)


@pytest.mark.slow
def test_an_embed_killed_while_its_processes_start_leaves_none_of_them(weights: Path, tmp_path: Path) -> None:
    copies = [{"image": str(shutil.copy(BUNDLED / "sub-01_T1w_2mm.nii.gz", tmp_path / f"{i}.nii.gz"))} for i in range(20)]
    write_datalist(tmp_path / "list.json", [{**copy, "shape": [1, 1, 1]} for copy in copies])
    mark = uuid.uuid4().hex
    for delay in (0.05, 0.15, 0.25, 0.35):
        process = start(command(tmp_path / "list.json", weights, tmp_path / "f.parquet", "--workers", "2"), mark)
        wait_for_children(process)
        time.sleep(delay)
        process.kill()  # the main process alone
        process.wait()
        assert not left_after(mark, 10), f"{delay:.2f} s after the first was started"


@pytest.mark.slow
def test_two_ranks_of_torchrun_make_the_table_of_one_process(real_list: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    flags = ("--mode", "resize", "--workers", "0")
    finish(command(real_list, weights, tmp_path / "one" / "f.parquet", *flags))
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = finish([*ranks, *command(real_list, weights, tmp_path / "two" / "f.parquet", *flags)])
    assert "f.parquet: 2 scans" in said
    assert (tmp_path / "one" / "f.parquet").read_bytes() == (tmp_path / "two" / "f.parquet").read_bytes()
