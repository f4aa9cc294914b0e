"""What DINOv2's evaluation scripts begin with, over `dinov2.features.setup` and `dinov2.utils.config`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from omegaconf import DictConfig

from dinov2.distributed.precision import DTYPES
from dinov2.features.setup import build_model_for_eval
from dinov2.models import DinoVisionTransformer3d
from dinov2.utils.config import setup_3d

__all__ = ["build_model_for_eval", "get_args_parser", "get_autocast_dtype", "setup_and_build_model_3d"]


def get_args_parser(
    description: str | None = None, parents: Sequence[argparse.ArgumentParser] | None = None, add_help: bool = True
) -> argparse.ArgumentParser:
    """The flags of `setup_and_build_model_3d`; the programs of this package have more (`dinov2.eval.run.eval_parser`)."""
    parser = argparse.ArgumentParser(description=description, parents=parents or [], add_help=add_help)
    parser.add_argument("--config-file", default="", help="configuration of the backbone, a YAML file or a name")
    parser.add_argument("--pretrained-weights", help="file, folder, owner/name on the hub, demo, random")
    parser.add_argument("--output-dir", default="", help="folder for results and log")
    parser.add_argument("--opts", nargs="*", default=[], metavar="key=value", help="configuration overrides")
    return parser


def get_autocast_dtype(config: DictConfig) -> torch.dtype:
    """What the teacher's backbone multiplies in, as configured (`evaluation_autocast` is what this package's programs use)."""
    return DTYPES[config.compute_precision.teacher.backbone.mixed_precision.param_dtype]


def setup_and_build_model_3d(args: argparse.Namespace) -> tuple[DinoVisionTransformer3d, torch.dtype]:
    """The frozen backbone of a command line (`get_args_parser`), and the dtype for autocast.

    Raises:
        BadInput: The configuration or the weights cannot be used, or do not fit each other.
    """
    config = setup_3d(args)
    return build_model_for_eval(config, args.pretrained_weights), get_autocast_dtype(config)
