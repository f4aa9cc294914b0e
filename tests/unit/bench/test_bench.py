"""`dinov2 bench`: machines arranged to have different bottlenecks, and what is said of a run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from dinov2.bench.command import bench_of
from dinov2.bench.measure import Measured, with_batch
from dinov2.bench.projection import HIGH_RESOLUTION, MONAI_VIT, STANDARD, memory_lines, projection, reference_for
from dinov2.bench.verdict import AUGMENTATION, BUSY_MACHINE, COMPUTE, DECODE, DISK, TRANSFER, judge
from dinov2.cli import main
from dinov2.configs import load_and_merge_config_3d
from dinov2.data import read_datalist, write_datalist
from dinov2.data.cache import store
from dinov2.data.volumes.opening import describe
from dinov2.distributed.runtime import start_runtime
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK
from tests.conftest import BUNDLED, ROOT, SMALL

FEW_CROPS = ["crops.local_crops_number=0", "student.depth=1"]
SETUPS = {  # what makes each the slowest part by far, whatever else the machine is busy with
    DISK: ["train.memory_store_mb=0", *FEW_CROPS],
    DECODE: ["train.memory_store_mb=0", *FEW_CROPS],
    AUGMENTATION: ["train.augmentation=monai", "student.depth=1", "student.patch_size=32", "crops.global_crops_size=96",
                   "crops.local_crops_size=32", "crops.local_crops_number=2"],
    COMPUTE: ["student.embed_dim=192", "student.depth=4", "student.num_heads=4"],
}  # fmt: skip


@pytest.fixture
def large_list(tmp_path: Path) -> Path:
    """Four times the voxels of a bundled scan, compressed."""
    scan = nib.load(BUNDLED / "sub-01_T1w_2mm.nii.gz")
    assert isinstance(scan, nib.Nifti1Image)
    nib.save(nib.Nifti1Image(np.tile(np.asarray(scan.dataobj), (2, 2, 1)), scan.affine), tmp_path / "large.nii.gz")
    write_datalist(tmp_path / "large.json", [describe(tmp_path / "large.nii.gz")])
    return tmp_path / "large.json"


@pytest.mark.parametrize("name", SETUPS)
def test_the_slowest_part_is_named(name: str, real_list: Path, large_list: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == DISK:
        load = store.load_volume

        def throttled(*args: Any) -> Any:
            time.sleep(0.15)
            return load(*args)

        monkeypatch.setattr(store, "load_volume", throttled)
    cfg = load_and_merge_config_3d(None, [*SMALL, *SETUPS[name]])
    datalist = read_datalist(large_list if name == DECODE else real_list)
    measured, verdict = bench_of(cfg, datalist, start_runtime(1), seconds=0.3)
    assert verdict.own == name, measured
    assert verdict.name == (BUSY_MACHINE if measured.queued >= 0.25 else name), "tests may run beside each other"
    assert measured.rate > 0 and measured.loader_rate > 0 and measured.model_rate > 0


@pytest.fixture
def one_shared_core() -> Iterator[None]:
    """This process and a busy one on the same core."""
    before = os.sched_getaffinity(0)
    core = min(before)
    busy = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", busy]) as program:
        os.sched_setaffinity(0, {core})
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)
            program.kill()


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="this system does not count waiting for a core")
@pytest.mark.usefixtures("one_shared_core")
def test_another_program_on_the_cores_is_named_and_what_it_would_be_without(real_list: Path) -> None:
    cfg = load_and_merge_config_3d(None, [*SMALL, *SETUPS[COMPUTE]])
    _, verdict = bench_of(cfg, read_datalist(real_list), start_runtime(1), seconds=0.6)
    assert (verdict.name, verdict.own) == (BUSY_MACHINE, COMPUTE)
    assert "no core was free" in verdict.advice[0]


QUIET = Measured(
    disk_s=0.001, decode_s=0.004, augment_s=0.014, transfer_s=0.002, compute_s=0.005, num_workers=1, queued=0.0,
    loader_rate=50, model_rate=200, rate=50, data_wait=0.7, batch=8, memory_gib=1,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes, name, words",
    [
        ({}, AUGMENTATION, "train.num_workers=4"),
        ({"num_workers": 4}, COMPUTE, "nothing is in the network's way"),
        ({"num_workers": 4, "transfer_s": 0.02}, TRANSFER, "bf16 or fp16"),
        ({"disk_s": 0.05}, DISK, "--cache-dir"),
        ({"decode_s": 0.05}, DECODE, "--cache-dir"),
        ({"num_workers": 0}, AUGMENTATION, "train.num_workers=4"),
        ({"num_workers": 0, "compute_s": 0.02}, COMPUTE, "nothing is in the network's way"),
        ({"queued": 0.3}, BUSY_MACHINE, "it would be augmentation"),
    ],
)
def test_processes_share_the_loaders_work_and_the_advice_fits_the_name(changes: dict[str, Any], name: str, words: str) -> None:
    verdict = judge(replace(QUIET, **changes), has_cache=False, is_compiled_augmentation=True, on_cpu=False)
    assert verdict.name == name and words in " ".join(verdict.advice), verdict
    assert "dinov2 doctor" not in " ".join(verdict.advice)


def test_the_papers_pace_gives_the_papers_days() -> None:
    for config, paper, devices, days in (
        ("pretrain/vit_large", STANDARD, 4, "9.0 days"),
        ("pretrain/vit_large_highres", HIGH_RESOLUTION, 4, "2.0 days"),
        ("pretrain/monai_vit_large", MONAI_VIT, 4, "9.7 days"),
    ):
        cfg = load_and_merge_config_3d(config)
        assert reference_for(cfg) == paper
        line, here, beside, h200 = projection(cfg, paper.volumes_per_s, devices, "GPU")
        assert (
            days in line
            and f"{paper.volumes_per_s} volumes/s on one GPU" in here
            and f"of {paper.effective_batch} volumes on 4 GPU" in line
        )
        assert f"{paper.volumes_per_s} volumes/s on each of four A100-80GB" in beside and "338 volumes/s" in h200


def test_what_fits_a_card_keeps_the_papers_batch() -> None:
    cfg = load_and_merge_config_3d("pretrain/vit_large")
    (need, card) = memory_lines(cfg, 4, 80.0)
    assert "about 66 GiB" in need and "fits; " in card and "train.batch_size_per_gpu=128 train.accumulation_steps=1" in card
    assert "train.batch_size_per_gpu=64 train.accumulation_steps=1" in memory_lines(cfg, 8, 80.0)[1]
    assert "does not fit; " in memory_lines(cfg, 1, 40.0)[1]
    assert "train.batch_size_per_gpu=64 train.accumulation_steps=8" in memory_lines(cfg, 1, 40.0)[1]
    assert "3 ranks do not divide" in memory_lines(cfg, 3, 40.0)[1]
    assert "no pass of" in memory_lines(cfg, 1, 4.0)[1]


def test_the_command_says_it_all_and_refuses_an_empty_list(real_list: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(real_list), "--seconds", "0.1", "--gpus", "2", *SMALL, "train.batch_size_per_gpu=40"]) == EXIT_OK
    text = capsys.readouterr().out
    measured = ["loader alone", "network alone", "end to end", "a volume, ms: reading", "instead of 40, to end in time"]
    concluded = ["bottleneck: ", "on 2 CPU process", "the paper's standard stage", "a card of 80 GiB: fits"]
    assert [words for words in measured + concluded if words not in text] == [], text
    empty = real_list.with_name("empty.json")
    empty.write_text("[]")
    assert main(["bench", str(empty)]) == main(["bench", str(real_list), "--gpus", "0"]) == EXIT_BAD_INPUT
    errors = [line for line in capsys.readouterr().err.splitlines() if " E " in line]
    assert len(errors) == 2 and "is empty" in errors[0] and "must be positive" in errors[1]


@pytest.mark.parametrize("ranks", [1, 4, 8])
@pytest.mark.parametrize("network", ["vit_large", "vit_base"])
def test_presets_keep_the_papers_batch_and_nothing_else_changes(network: str, ranks: int) -> None:
    preset, paper = load_and_merge_config_3d(f"pretrain/{network}_{ranks}gpu"), load_and_merge_config_3d("pretrain/vit_large")
    assert preset.train.batch_size_per_gpu * preset.train.accumulation_steps * ranks == STANDARD.effective_batch
    assert preset.student.arch == f"{network}_3d"
    assert (preset.optim, preset.crops, preset.teacher) == (paper.optim, paper.crops, paper.teacher)
    promised = re.search(r"(\d+) GB", (ROOT / f"configs/pretrain/{network}_{ranks}gpu.yaml").read_text())
    assert promised and "fits; " in memory_lines(preset, ranks, float(promised[1]))[1]


def test_the_timed_configuration_has_one_pass_an_update() -> None:
    cfg = with_batch(load_and_merge_config_3d("pretrain/tiny_cpu", ["train.accumulation_steps=4"]), 3)
    assert (cfg.train.batch_size_per_gpu, cfg.train.accumulation_steps) == (3, 1)
