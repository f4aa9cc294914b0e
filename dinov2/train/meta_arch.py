"""What the loop trains, whatever the objective: a student, its moving average the teacher, and how both are called.

An objective (`SSLMetaArch`: 3DINO; `SwinMetaArch`: the tasks of Swin UNETR's pretraining) adds heads and one training step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dinov2.distributed.precision import HALF, autocast, module_precision, training_dtype
from dinov2.fsdp.tensors import own_part
from dinov2.layers.dino_head import WeightNormLinear
from dinov2.loss.row_math import PLAIN
from dinov2.models import DinoVisionTransformer3d, build_backbone
from dinov2.train.param_groups import fuse_groups, param_groups_with_decay

Batch = dict[str, Any]


class Networks(nn.ModuleDict):
    """One side's networks by name, as they are saved: `backbone`, and the objective's heads."""

    backbone: DinoVisionTransformer3d


class Pass(NamedTuple):
    """A network's part in a step, for counting its matrix products."""

    backbone: DinoVisionTransformer3d
    crops: list[Tensor]  # [n, 1, s, s, s] each
    times: int  # 3 with a backward pass, which has two products of the size of each, else 1
    head_flops: int  # forward


def linear_flops(module: nn.Module) -> int:
    """Operations of a module's linear layers for one row."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | WeightNormLinear)]
    return sum(2 * (m.weight_v if isinstance(m, WeightNormLinear) else m.weight).numel() for m in layers)


class MetaArch(nn.Module, ABC):
    """Student, its moving average the teacher, and one training step.

    Args:
        cfg: A merged configuration (`load_and_merge_config_3d`).
        attention: `sdpa` or `xformers`, as resolved for the device.
    """

    def __init__(self, cfg: DictConfig, attention: str = "sdpa") -> None:
        super().__init__()
        self.cfg = cfg
        self.student = Networks(self._build_side(attention, teacher=False))
        self.teacher = Networks(self._build_side(attention, teacher=True)).requires_grad_(False)
        self.student_calls: dict[str, DistributedDataParallel] = {}  # by name, called instead of a student's module
        # around a micro-batch; told whether it is the last
        self.gradient_sync: Callable[[bool], AbstractContextManager[None]] = lambda is_last: nullcontext()
        self.row_math = PLAIN  # or compiled, by `compile_model`
        self.compile_state = "off"  # untried, on: of `compile_model`
        self.grad_scaler = torch.amp.GradScaler(enabled=False)  # the loop replaces it where fp16 needs one
        if cfg.compute_precision.student.backbone.mixed_precision.param_dtype == "fp64":
            self.double()
        self.start_teacher_from_student()
        self.train()

    @abstractmethod
    def build_heads(self, backbone: DinoVisionTransformer3d) -> dict[str, nn.Module]:
        """One side's heads by name."""

    @abstractmethod
    def forward_backward(self, batch: Batch | list[Batch], teacher_temp: float, monitor: bool = False) -> dict[str, Tensor]:
        """Losses by name, `total_loss` among them, as scalars on the device; the gradients are left on the student.

        Args:
            batch: A collated batch, or the micro-batches of one update.
            teacher_temp: Temperature of a teacher's softmax.
            monitor: Add what tells how training goes.
        """

    @abstractmethod
    def passes(self, batch: Batch) -> list[Pass]:
        """What a step does with a micro-batch."""

    def _build_side(self, attention: str, teacher: bool) -> dict[str, nn.Module]:
        backbone = build_backbone(self.cfg, teacher, attention)
        backbone.recompute_blocks = not teacher and self.cfg.train.activation_checkpointing == "full"
        return {"backbone": backbone, **self.build_heads(backbone)}

    def start_teacher_from_student(self) -> None:
        """Copy the student's weights into the teacher."""
        self.teacher.load_state_dict(self.student.state_dict())

    def train(self, mode: bool = True) -> MetaArch:
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def update_teacher(self, momentum: float, skip: Tensor | None = None) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student; where `skip`, a scalar on the device, is 1, not at all."""
        teacher, student = ([own_part(p) for p in side.parameters()] for side in (self.teacher, self.student))
        weight = teacher[0].new_full((), 1 - momentum)
        if skip is not None:
            weight = weight * (1 - skip)
        torch._foreach_lerp_(teacher, student, [weight] * len(teacher))

    @torch.no_grad()
    def teacher_patches(self, voxels: Tensor) -> Tensor:
        """[R, 1, S, S, S] -> the teacher's patch tokens [R, N, E]."""
        tokens: Tensor = self._run("teacher", "backbone", voxels, is_training=True)["x_norm_patchtokens"]
        return tokens

    def get_params_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups of the student: parameters of equal learning-rate and weight-decay factors together."""
        depth = len(self.student.backbone.block_list)
        o = self.cfg.optim
        named = [
            group
            for module, net in self.student.items()
            for group in param_groups_with_decay(net, module, depth, o.layerwise_decay, o.patch_embed_lr_mult)
        ]
        return fuse_groups(named)

    def _run(self, side: str, module: str, *args: Any, **kwargs: Any) -> Any:
        """A module of one side under its configured precision."""
        net = getattr(self, side)[module]
        call = self.student_calls.get(module, net) if side == "student" else net
        device_type = next(net.parameters()).device.type
        dtype = training_dtype(module_precision(self.cfg, side, module), device_type)
        if dtype == torch.float32:  # what a module in half precision hands over: no autocast takes it to this one's dtype
            args = tuple(x.float() if isinstance(x, Tensor) and x.dtype in HALF else x for x in args)
        with autocast(device_type, dtype):
            return call(*args, **kwargs)
