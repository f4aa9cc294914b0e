"""What TensorBoard shows of a run, and that the run does not know of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dinov2.data import TrainLoader, read_datalist
from dinov2.train import train3d
from dinov2.train.pictures import EDGE, MASKED, Pictures, crops_picture, side_by_side
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.conftest import Trainer

TEACHER = "eval/training_11/teacher_checkpoint.pth"


def test_pictures_come_at_evaluation_periods_and_change_nothing(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    period = "evaluation.eval_period_iterations=4"
    assert trainer.call(tmp_path / "with", period).returncode == 0
    monkeypatch.setattr(train3d.Pictures, "draw", lambda *_: {})
    assert trainer.call(tmp_path / "without", period).returncode == 0
    shown, none = (EventAccumulator(str(tmp_path / name / "tensorboard")).Reload() for name in ("with", "without"))
    assert none.Tags()["images"] == []
    assert sorted(shown.Tags()["images"]) == ["pictures/crops", "pictures/pca"]
    assert [event.step for event in shown.Images("pictures/pca")] == [3, 7, 11]
    one, other = (torch.load(tmp_path / name / TEACHER, weights_only=True)["teacher"] for name in ("with", "without"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    losses = [
        [json.loads(line)["total_loss"] for line in (tmp_path / name / "training_metrics.json").read_text().splitlines()]
        for name in ("with", "without")
    ]
    assert losses[0] == losses[1]


def test_a_mask_darkens_what_it_hides(real_list: Path, small_config: Any) -> None:
    cfg = small_config("ibot.mask_sample_probability=1.0", "ibot.mask_ratio_min_max=[0.5,0.5]")
    batch = next(iter(TrainLoader(cfg, read_datalist(real_list))))[0]
    masks = batch["collated_masks"][0].view(4, 4, 4)[:, :, 2]
    batch["collated_global_crops"].fill_(1.0)
    picture = crops_picture(batch, patch_size=4)
    assert len(picture) >= EDGE and picture.shape[2] == 3
    enlarged = EDGE // 16
    shown = picture[: 16 * enlarged : 4 * enlarged, : 16 * enlarged : 4 * enlarged, 0]  # a pixel of each patch
    np.testing.assert_allclose(shown, np.where(masks.numpy(), MASKED, 1.0), rtol=1e-6)


def test_patches_that_look_the_same_are_said_once_and_crops_are_shown(
    real_list: Path, small_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cfg, datalist = small_config(), read_datalist(real_list)
    model, batch = SSLMetaArch(cfg), next(iter(TrainLoader(cfg, datalist)))[0]
    pictures = Pictures(datalist, 16, 4, "")
    assert set(pictures.draw(model, batch, is_whole=False)) == {"crops"}, "no pass that other ranks would have to join"
    assert set(pictures.draw(model, batch, is_whole=True)) == {"crops", "pca"}
    for weight in model.teacher.parameters():
        weight.data.zero_()
    with caplog.at_level(logging.INFO):
        assert [set(pictures.draw(model, batch, is_whole=True)) for _ in range(2)] == [{"crops"}] * 2
    assert [r.getMessage()[:21] for r in caplog.records if r.name.endswith("pictures")] == ["no picture of patches"]


def test_a_row_of_pictures_keeps_whole_pixels() -> None:
    row = side_by_side([np.zeros((3, 3, 3), np.float32), np.zeros((200, 200, 3), np.float32)])
    assert row.shape == (200, 66 * 3 + 200 + 2 * 4, 3) and (row[198:, :198] == 1).all() and (row[:198, :198] == 0).all()
