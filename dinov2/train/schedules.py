"""Learning rate, weight decay, teacher momentum and temperature as functions of the iteration.

Source: DINOv2's schedules; 3DINO paper, "3DINO pretraining implementation details".
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from torch.optim import Optimizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up from `start` to `base`, then a cosine to `final`, which holds afterwards.

    The warm-up ends exactly on `base` in its last iteration; `zero_iters` iterations at the start are 0 altogether.
    """

    base: float
    final: float
    total_iters: int
    warmup_iters: int = 0
    start: float = 0.0
    zero_iters: int = 0

    def __call__(self, iteration: int) -> float:
        if iteration < self.zero_iters:
            return 0.0
        if iteration >= self.total_iters:
            return self.final
        if iteration < self.warmup_iters:
            return self.start + (self.base - self.start) * iteration / max(self.warmup_iters - 1, 1)
        progress = (iteration - self.warmup_iters) / (self.total_iters - self.warmup_iters)
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class StepParams:
    """The scheduled values of one iteration."""

    lr: float
    wd: float
    mom: float
    teacher_temp: float
    last_layer_lr: float


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run; call with the iteration."""

    lr: CosineSchedule
    wd: CosineSchedule
    mom: CosineSchedule
    teacher_temp: CosineSchedule
    last_layer_lr: CosineSchedule
    total_iters: int

    def __call__(self, iteration: int) -> StepParams:
        names = ("lr", "wd", "mom", "teacher_temp", "last_layer_lr")
        return StepParams(**{name: getattr(self, name)(iteration) for name in names})


def scaled_lr(cfg: DictConfig, world_size: int) -> float:
    """The peak learning rate: `optim.base_lr` scaled by the effective batch size, as DINOv2; `optim.lr` is not read."""
    o = cfg.optim
    batch = cfg.train.batch_size_per_gpu * world_size * cfg.train.accumulation_steps
    factor = {"sqrt_wrt_1024": math.sqrt(batch / 1024), "linear_wrt_256": batch / 256, "none": 1.0}
    return o.base_lr * factor[o.scaling_rule]


def with_derived_lr(cfg: DictConfig, world_size: int) -> DictConfig:
    """The configuration with the run's rate as `optim.lr`, as DINOv2 keeps it in a run's `config.yaml`.

    A value that was given, such as that of another run's file, is said where it is another one.
    """
    lr, given = scaled_lr(cfg, world_size), cfg.optim.lr
    if given and not math.isclose(given, lr):
        what = "optim.lr=%g has no effect: it is %g, optim.base_lr=%g by optim.scaling_rule=%s (none: base_lr as it is)"
        logger.info(what, given, lr, cfg.optim.base_lr, cfg.optim.scaling_rule)
    derived = cfg.copy()
    OmegaConf.set_readonly(derived, False)
    derived.optim.lr = lr
    OmegaConf.set_readonly(derived, True)
    return derived


def _warmup_within(run_iters: int, warmup_iters: int, name: str) -> int:
    if warmup_iters > run_iters:
        logger.warning("%s: the warm-up of %d iterations is cut to the run's %d", name, warmup_iters, run_iters)
    return min(warmup_iters, run_iters)


def build_schedules(cfg: DictConfig, world_size: int = 1) -> Schedules:
    """The schedules of a configuration, for a number of ranks (the learning rate depends on it)."""
    o, t, epoch = cfg.optim, cfg.teacher, cfg.train.OFFICIAL_EPOCH_LENGTH
    total = o.epochs * epoch
    lr_warmup = _warmup_within(total, o.warmup_epochs * epoch, "optim.warmup_epochs")
    temp_warmup = _warmup_within(total, t.warmup_teacher_temp_epochs * epoch, "teacher.warmup_teacher_temp_epochs")
    lr = scaled_lr(cfg, world_size)
    return Schedules(
        lr=CosineSchedule(lr, o.min_lr, total, lr_warmup),
        wd=CosineSchedule(o.weight_decay, o.weight_decay_end, total),
        mom=CosineSchedule(t.momentum_teacher, t.final_momentum_teacher, total),
        teacher_temp=CosineSchedule(t.teacher_temp, t.teacher_temp, temp_warmup, temp_warmup, t.warmup_teacher_temp),
        last_layer_lr=CosineSchedule(lr, o.min_lr, total, lr_warmup, zero_iters=o.freeze_last_layer_epochs * epoch),
        total_iters=total,
    )


def apply_schedules(optimizer: Optimizer, hp: StepParams) -> None:
    """Write an iteration's learning rates and weight decay into the optimiser's groups."""
    for group in optimizer.param_groups:
        group["lr"] = (hp.last_layer_lr if group["is_last_layer"] else hp.lr) * group["lr_multiplier"]
        group["weight_decay"] = hp.wd * group["wd_multiplier"]
