"""How much memory of a GPU a training step takes, from bytes counted per row; and what fits where it took too much.

The constants are fitted to peaks of one H200 (tests/unit/train/test_forecast.py); a new measurement changes them here alone.

Shapes: T tokens of the student's pass, R of them that stochastic depth keeps, E embedding, K prototypes, M masked patches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

from omegaconf import DictConfig

from dinov2.configs.loader import network_shape
from dinov2.configs.schema import NUM_GLOBAL_CROPS, memory_budget
from dinov2.errors import BadInput

GIB = 2**30


class Footprint(NamedTuple):
    """Bytes in half precision.

    block: kept for the backward pass per row of R, channel of E and block, beside the hidden layer.
    hidden: the same per hidden channel of the MLP.
    heads: live at the peak per row of the student's heads and prototype.
    once: per token of T and channel, for what is not repeated in every block.
    """

    block: float
    hidden: float
    heads: float
    once: float = 50.0


WEIGHTS = (
    18.0  # bytes a parameter: student, teacher, two moments, and casts to half precision at the peak; gradients come after it
)
EAGER = Footprint(block=22.9, hidden=4.0, heads=16.0)
COMPILED = Footprint(block=19.5, hidden=4.0, heads=8.0)
BUDGET_USED = 0.82  # of an activation budget below 1 what the compiler's choice amounts to (seen at 0.8)
USABLE = 0.94  # of a card's memory: the rest is the driver's, and lost between blocks of the allocator


def forecast_gib(cfg: DictConfig, batch: int, compiled: bool, shards: int = 1) -> float:
    """GiB at the peak of a step with `batch` volumes a pass.

    Args:
        cfg: A merged configuration.
        batch: `train.batch_size_per_gpu`.
        compiled: Whether blocks and heads are compiled.
        shards: Ranks that share out weights and moments (fsdp).
    """
    f = COMPILED if compiled else EAGER
    s, c = cfg.student, cfg.crops
    embed_dim, depth = network_shape(cfg)[:2]
    patches = (c.global_crops_size // s.patch_size) ** 3
    lengths = [1 + s.num_register_tokens + (size // s.patch_size) ** 3 for size in (c.global_crops_size, c.local_crops_size)]
    is_swin = cfg.train.objective == "swin"
    tokens = batch * (NUM_GLOBAL_CROPS * lengths[0] + (0 if is_swin else c.local_crops_number * lengths[1]))
    kept = tokens * (1 - s.drop_path_rate if s.drop_path_rate > 0.1 else 1)
    of_block = f.block * embed_dim + f.hidden * _hidden_channels(cfg)  # a row
    budget = memory_budget(cfg.train.activation_checkpointing)
    if cfg.train.activation_checkpointing == "full":
        blocks = depth * tokens * embed_dim * 2 + kept * of_block  # every block's input, and one block at a time
    else:
        blocks = depth * kept * of_block * (budget * BUDGET_USED if compiled and budget is not None and budget < 1 else 1)
    views = NUM_GLOBAL_CROPS * batch
    heads = _reconstruction_bytes(cfg, views * patches) if is_swin else f.heads * _scores(cfg, batch, views * patches)
    voxels = NUM_GLOBAL_CROPS * c.global_crops_size**3 + c.local_crops_number * c.local_crops_size**3
    activations = blocks + heads + f.once * tokens * embed_dim + 2 * batch * voxels
    is_half = cfg.compute_precision.student.backbone.mixed_precision.param_dtype in ("fp16", "bf16")
    return (WEIGHTS * num_parameters(cfg) / shards + activations * (1 if is_half else 2)) / GIB


def _scores(cfg: DictConfig, batch: int, patches: int) -> float:
    """The student's scores of class tokens and masked patches, over all prototypes."""
    masked = patches * cfg.ibot.mask_sample_probability * sum(cfg.ibot.mask_ratio_min_max) / 2
    cls = batch * (NUM_GLOBAL_CROPS + cfg.crops.local_crops_number) * cfg.dino.head_n_prototypes
    return masked * _patch_head(cfg).head_n_prototypes + cls


def _reconstruction_bytes(cfg: DictConfig, patches: int) -> float:
    """What the transposed convolutions of `train.objective=swin` keep, with the gradient of it: not measured on a card."""
    embed_dim, steps = network_shape(cfg)[0], int(math.log2(cfg.student.patch_size))
    return 4.0 * patches * sum(8**i * max(1, embed_dim >> i) for i in range(1, steps + 1))


def _patch_head(cfg: DictConfig) -> DictConfig:
    return cfg.ibot if cfg.ibot.separate_head else cfg.dino


def _hidden_channels(cfg: DictConfig) -> float:
    """Channels that an MLP keeps two values of, as a plain one of four times the width does."""
    embed_dim = network_shape(cfg)[0]
    return 4.0 * embed_dim if cfg.student.ffn_layer == "mlp" else 2 * 8 / 3 * embed_dim


def num_parameters(cfg: DictConfig) -> int:
    """Of the student: products' weights, positions and prototypes (biases and norms are left out)."""
    embed_dim, depth, _ = network_shape(cfg)
    patches = (cfg.crops.global_crops_size // cfg.student.patch_size) ** 3
    backbone = 12 * depth * embed_dim**2 + embed_dim * (cfg.student.patch_size**3 + patches)
    heads = [cfg.dino, *([cfg.ibot] if cfg.ibot.separate_head else [])]
    for h in heads:
        widths = [embed_dim, *[h.head_hidden_dim] * (h.head_nlayers - 1), h.head_bottleneck_dim, h.head_n_prototypes]
        backbone += sum(a * b for a, b in pairwise(widths))
    return backbone


def batch_that_fits(cfg: DictConfig, gib: float, compiled: bool, shards: int, below: int) -> int | None:
    """The largest pass below `below` that divides a rank's volumes of an update and fits into `gib`; None: none does."""
    volumes = cfg.train.batch_size_per_gpu * cfg.train.accumulation_steps
    sizes = [b for b in range(below - 1, 0, -1) if volumes % b == 0]
    return next((b for b in sizes if forecast_gib(cfg, b, compiled, shards) <= gib * USABLE), None)


@contextmanager
def out_of_memory_explained(cfg: DictConfig, compiled: bool, shards: int = 1) -> Iterator[None]:
    """Turn a device's out-of-memory error into one line: what was asked, what should fit, and what keeps the effective batch.

    Raises:
        BadInput: Instead of `torch.OutOfMemoryError`.
    """
    import torch  # here: a forecast needs none

    try:
        yield
    except torch.OutOfMemoryError as err:
        batch, passes = cfg.train.batch_size_per_gpu, cfg.train.accumulation_steps
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(err))
        total = re.search(r"total capacity of ([\d.]+) GiB", str(err))
        found = f" ({asked[1]} more asked for" + (f" of a card's {total[1]} GiB)" if total else ")") if asked else ""
        need = f"a step takes about {forecast_gib(cfg, batch, compiled, shards):.0f} GiB by the forecast"
        # others may use the card too, and a forecast can be wrong: a pass of the same size is never proposed
        fits = batch_that_fits(cfg, float(total[1]) if total else math.inf, compiled, shards, below=batch)
        if fits:
            advice = f"use train.batch_size_per_gpu={fits} train.accumulation_steps={batch * passes // fits}, the same batch"
        else:
            advice = "no smaller pass fits: use train.activation_checkpointing=full, or a smaller network"
        raise BadInput(f"out of memory with train.batch_size_per_gpu={batch}{found}: {need}: {advice}") from err
