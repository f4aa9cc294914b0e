"""One model on many ranks: replicated (DDP) or sharded (FSDP2). A single process needs nothing of this.

single   one process
ddp      every rank has all parameters; gradients are averaged
fsdp     parameters, gradients and optimiser state are shared out (`fully_shard`), block by block; each module by its
         `compute_precision.*.sharding_strategy`: FULL_SHARD gathers parameters again for the backward pass, SHARD_GRAD_OP
         keeps them from the forward pass on, NO_SHARD replicates
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch
from omegaconf import DictConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dinov2.distributed.precision import DTYPES, HALF, module_precision, training_dtype
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput

logger = logging.getLogger(__name__)


class TwoSides(Protocol):
    """What is spread: networks by name on both sides, and what the ranks need around them.

    Attributes:
        student_calls: By name, what is called for a student's network instead of it.
        gradient_sync: Context around a micro-batch; its argument: whether it is the update's last.
    """

    student_calls: dict[str, DistributedDataParallel]
    gradient_sync: Callable[[bool], AbstractContextManager[None]]

    @property
    def student(self) -> nn.ModuleDict: ...

    @property
    def teacher(self) -> nn.ModuleDict: ...


def resolve_strategy(strategy: str, runtime: Runtime) -> str:
    """`auto`: single in one process, fsdp on GPUs (as the paper), ddp on CPUs.

    Raises:
        BadInput: fsdp on CPUs with a torch whose own code for it needs GPUs.
    """
    if runtime.world_size == 1:
        return "single"
    if strategy == "fsdp" and runtime.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise BadInput(f"train.strategy=fsdp: on CPUs it needs a newer torch than {torch.__version__}: use ddp, or update it")
    if strategy == "auto":
        return "fsdp" if runtime.device.type == "cuda" else "ddp"
    return strategy


def num_shards(cfg: DictConfig, runtime: Runtime) -> int:
    """Ranks that weights and moments are shared out over."""
    return runtime.world_size if resolve_strategy(cfg.train.strategy, runtime) == "fsdp" else 1


def parallelise(model: TwoSides, cfg: DictConfig, runtime: Runtime) -> None:
    """Spread a model over the ranks by `train.strategy`, in place; every rank holds the same weights before."""
    strategy = resolve_strategy(cfg.train.strategy, runtime)
    if strategy == "ddp":
        device_ids = [runtime.device.index] if runtime.device.type == "cuda" else None
        for name, net in model.student.items():
            if any(p.requires_grad for p in net.parameters()):
                model.student_calls[name] = DistributedDataParallel(net, device_ids, gradient_as_bucket_view=True)
    if strategy == "fsdp":
        mesh = init_device_mesh(runtime.device.type, (1, runtime.world_size), mesh_dim_names=("replicate", "shard"))
        copies = init_device_mesh(runtime.device.type, (runtime.world_size, 1), mesh_dim_names=("replicate", "shard"))
        for side in ("student", "teacher"):
            for name, net in getattr(model, side).items():
                precision = module_precision(cfg, side, name)
                _shard(net, copies if precision.sharding_strategy == "NO_SHARD" else mesh["shard"], precision, side, runtime)
    model.gradient_sync = lambda is_last: _gradient_sync(model, strategy, is_last)
    if runtime.world_size > 1:
        logger.info("%s over %d ranks", strategy, runtime.world_size)


def _shard(net: nn.Module, mesh: DeviceMesh, precision: DictConfig, side: str, runtime: Runtime) -> None:
    # A teacher never runs backward, so what it gathered for a forward pass would stay gathered, and the moving average would
    # then update shards that the next forward pass does not read: it gives its parameters back after each pass.
    reshard = side == "teacher" or precision.sharding_strategy == "FULL_SHARD"
    policy = _mixed_precision(precision, runtime)
    for block in getattr(net, "block_list", []):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    fully_shard(net, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)


def _mixed_precision(precision: DictConfig, runtime: Runtime) -> MixedPrecisionPolicy:
    p = precision.mixed_precision
    param_dtype = training_dtype(precision, runtime.device.type)
    if param_dtype not in HALF:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=DTYPES[p.reduce_dtype])


@contextmanager
def _gradient_sync(model: TwoSides, strategy: str, is_last: bool) -> Iterator[None]:
    """Around the forward and backward pass of a micro-batch: gradients cross ranks only in the last one."""
    with ExitStack() as stack:
        if strategy == "ddp" and not is_last:
            for replica in model.student_calls.values():
                stack.enter_context(replica.no_sync())
        if strategy == "fsdp":
            for net in model.student.modules():
                if isinstance(net, FSDPModule):
                    net.set_requires_gradient_sync(is_last, recurse=False)
        yield
