"""What a run is built from: model, optimiser, start weights, checkpoints."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch.optim import AdamW

from dinov2.checkpointer.checkpointer import Checkpointer
from dinov2.checkpointer.domain import DOMAIN, Domain
from dinov2.checkpointer.teacher import open_teacher, open_trained
from dinov2.data.corpus.domain import domain_of
from dinov2.data.corpus.overlap import TRAINED_ON, Seen, seen_by_weights, seen_in
from dinov2.data.datalist import Datalist
from dinov2.distributed import is_main_process
from dinov2.distributed.precision import grad_scaler, training_dtype
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.fsdp.parallel import parallelise
from dinov2.layers.attention import resolve_attention
from dinov2.models.inflation import inflated
from dinov2.models.weights import load_backbone, load_heads
from dinov2.streams import Kind, torch_seed
from dinov2.train.compiling import compile_as_configured
from dinov2.train.meta_arch import MetaArch
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.swin_meta_arch import SwinMetaArch

logger = logging.getLogger(__name__)


def build(cfg: DictConfig, runtime: Runtime, load_start: bool = False) -> tuple[MetaArch, AdamW]:
    """Model from the run's seed or its start weights, spread over the ranks, and the optimiser over the student."""
    torch.manual_seed(torch_seed(cfg.train.seed, Kind.INIT, 0))
    arch = {"3dino": SSLMetaArch, "swin": SwinMetaArch}[cfg.train.objective]
    model = arch(cfg, resolve_attention(cfg.student.attention, runtime.device.type)).to(runtime.device)
    if load_start:
        load_start_weights(model, cfg)
    logger.info("student of %.1f M parameters", sum(p.numel() for p in model.student.parameters()) / 1e6)
    compile_as_configured(model, cfg, runtime)
    parallelise(model, cfg, runtime)
    o = cfg.optim
    optimizer = AdamW(model.get_params_groups(), betas=(o.adamw_beta1, o.adamw_beta2), fused=True)
    dtype = training_dtype(cfg.compute_precision.student.backbone, runtime.device.type)
    model.grad_scaler = grad_scaler(runtime.device.type, dtype, cfg.compute_precision.grad_scaler)
    return model, optimizer


def start_weights(cfg: DictConfig) -> str:
    """The file that a run starts from; empty for none."""
    return cfg.student.full_pretrained_weights or cfg.student.pretrained_weights or cfg.MODEL.WEIGHTS


def load_start_weights(model: MetaArch, cfg: DictConfig) -> None:
    """Start from a backbone, or from backbone and heads; optimiser and centres start afresh either way."""
    path = start_weights(cfg)
    if not path:
        return
    start, how = open_trained(path), cfg.student.pretrained_weights_inflation
    weights = inflated(start.state, model.student.backbone, how, path) if how else start.weights
    load_backbone(model.student.backbone, weights, path)
    if cfg.student.full_pretrained_weights:
        load_heads({k: v for k, v in model.student.items() if k != "backbone"}, weights, path)
    model.start_teacher_from_student()
    logger.info("started from %s", path)


def data_record(datalist: Datalist, cfg: DictConfig) -> dict[str, Any]:
    """What weights say of their data, the start weights' too: the list's hash, scans and patients seen, what they are like."""
    seen, domain, path = seen_in(datalist.entries), domain_of(datalist.entries), start_weights(cfg)
    if path and is_main_process():
        before = None
        with suppress(BadInput):
            start = open_teacher(path)
            before = seen_by_weights(start)
            known = Domain.of_meta(start.meta.get(DOMAIN), path)
            domain = domain if known is None else domain | known
        if before is None:
            logger.warning("%s does not say what it was trained on; these weights will count that as unknown", path)
        seen = seen | (before or Seen(frozenset(), frozenset(), 1))
    return {"datalist_sha256": datalist.sha256, TRAINED_ON: seen.as_meta(), DOMAIN: domain.as_meta()}


def build_checkpointer(cfg: DictConfig, output_dir: Path) -> Checkpointer:
    """Checkpoints of a run; those at evaluation periods are milestones and stay."""
    period = cfg.evaluation.eval_period_iterations
    folder = output_dir / "checkpoints"
    return Checkpointer(folder, cfg.train.checkpoint_keep, lambda i: period > 0 and (i + 1) % period == 0)
