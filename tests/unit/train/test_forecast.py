"""The forecast of a GPU's memory against measured peaks, and the advice made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinov2.cli import main
from dinov2.configs import ConfigError, load_and_merge_config_3d
from dinov2.train import train3d
from dinov2.train.forecast import USABLE, batch_that_fits, forecast_gib, num_parameters
from tests.conftest import Trainer

# one H200, bf16, torch 2.11, ViT-L: (compiled, activation_checkpointing, volumes) -> GiB (docs/gpu.md)
MEASURED = {
    (False, "none", 16): 14.9,
    (False, "none", 64): 41.7,
    (False, "none", 128): 77.3,
    (True, "none", 64): 36.0,
    (True, "none", 128): 65.8,
    (True, "budget:0.8", 128): 49.0,
}


@pytest.mark.parametrize("compiled, mode, batch", MEASURED)
def test_the_forecast_meets_what_was_measured(compiled: bool, mode: str, batch: int) -> None:
    cfg = load_and_merge_config_3d(None, [f"train.activation_checkpointing={mode}"])
    assert forecast_gib(cfg, batch, compiled) == pytest.approx(MEASURED[compiled, mode, batch], rel=0.01)


def test_parameters_are_counted_from_the_configuration() -> None:
    assert num_parameters(load_and_merge_config_3d()) == pytest.approx(354_105_856, rel=0.005)


def test_the_published_batch_fits_a_card_of_80_gib_and_each_switch_takes_less() -> None:
    plain, budget, full = (
        forecast_gib(load_and_merge_config_3d(None, [f"train.activation_checkpointing={mode}"]), 128, compiled=True)
        for mode in ("none", "budget:0.8", "full")
    )
    assert full < budget < plain < 70
    assert forecast_gib(load_and_merge_config_3d(), 128, compiled=False) > 80 * USABLE
    fp32 = [f"compute_precision.student.{m}.mixed_precision.param_dtype=fp32" for m in ("backbone", "dino_head", "ibot_head")]
    assert forecast_gib(load_and_merge_config_3d(None, fp32), 64, compiled=True) > 1.5 * forecast_gib(
        load_and_merge_config_3d(), 64, compiled=True
    )


def test_config_check_says_the_forecast(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "pretrain/vit_large", "train.batch_size_per_gpu=48"]) == 0
    said = capsys.readouterr().out
    assert "GiB for 48" in said and "GiB for 128" in said


@pytest.mark.parametrize(
    "mode, words",
    [
        ("selective", "is gone .*: use budget:0.8 .*, or full"),
        ("budget", "not one of none, full, budget:SHARE"),
        ("budget:1.5", "a share from 0 to 1"),
    ],
)
def test_a_switch_that_is_gone_or_wrong_says_what_to_use(mode: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_and_merge_config_3d(None, [f"train.activation_checkpointing={mode}"])


def test_out_of_memory_is_one_line_with_what_fits(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_args: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of which 3 MiB is free."
        )

    monkeypatch.setattr(train3d, "train_step", full)
    words = ["train.batch_size_per_gpu=12", "train.accumulation_steps=2"]
    assert train3d.main(trainer.command(tmp_path / "run", *words)[2:]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if " E " in text]
    assert "out of memory with train.batch_size_per_gpu=12 (20.00 MiB more asked for of a card's 79.15 GiB)" in line
    assert "GiB by the forecast: use train.batch_size_per_gpu=8 train.accumulation_steps=3, the same batch" in line


def test_what_fits_divides_the_volumes_of_an_update() -> None:
    cfg = load_and_merge_config_3d(None, ["train.batch_size_per_gpu=128", "train.accumulation_steps=3"])
    fits = batch_that_fits(cfg, 40.0, compiled=True, shards=1, below=128)
    assert fits == 64 and forecast_gib(cfg, 96, compiled=True) > 40 * 0.94
    assert batch_that_fits(cfg, 4.0, compiled=True, shards=1, below=128) is None
    assert batch_that_fits(cfg, 7.0, compiled=True, shards=4, below=128) > 1  # weights and moments shared out
