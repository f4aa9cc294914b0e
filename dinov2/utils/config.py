"""DINOv2's start of a script: configuration, ranks, folder and log in one call."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from dinov2.configs import default_yaml, load_and_merge_config_3d
from dinov2.distributed.runtime import start_runtime
from dinov2.files import write_text
from dinov2.logging import setup_logging
from dinov2.logging.folder import THEIR_PRETRAINING, refuse_another_programs_run
from dinov2.train.schedules import with_derived_lr


def setup_3d(args: argparse.Namespace) -> DictConfig:
    """The configuration of a command line, with what a script needs before it begins: ranks, seeds, folder, log.

    Args:
        args: `config_file` (empty: the published defaults), `opts` (``key=value`` words), `output_dir` (empty: the working
            folder) and, where there is one, `cache_dir`.

    Returns:
        The configuration, read-only; `optim.lr` is the peak learning rate, scaled for the batch. Rank 0 writes it to
        `config.yaml` in the folder.

    Raises:
        BadInput: As `load_and_merge_config_3d`, or the folder holds another program's pretraining.
    """
    folder = Path(args.output_dir or ".").absolute()
    named = {"train.output_dir": folder, "train.cache_dir": getattr(args, "cache_dir", None)}
    words = [*(args.opts or []), *(f"{key}={value}" for key, value in named.items() if value)]
    cfg = load_and_merge_config_3d(args.config_file or None, words)
    refuse_another_programs_run(folder, THEIR_PRETRAINING)  # whose configuration this would write over
    runtime = start_runtime(cfg.train.num_threads, cfg.train.backend, cfg.train.timeout_s)
    cfg = with_derived_lr(cfg, runtime.world_size)
    folder.mkdir(parents=True, exist_ok=True)
    setup_logging(folder, runtime.rank)
    for seed in (torch.manual_seed, np.random.seed, random.seed):  # what scripts draw from, and the masks of DINOv2's collation
        seed(cfg.train.seed + runtime.rank)
    if runtime.rank == 0:
        write_text(folder / "config.yaml", default_yaml(cfg))
    return cfg
