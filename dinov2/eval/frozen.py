"""What all evaluations of frozen features share: flags, data, the folder's record, features of whole parts.

n cases, F features: class tokens of the last layers, then the mean of the last layer's patch tokens (`class_features`).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from dinov2.configs import default_yaml, load_and_merge_config_3d
from dinov2.data.cases import Cases, check_headers
from dinov2.data.crops import central_view
from dinov2.data.datalist import Entry
from dinov2.data.downstream import Item, datalist_path, read_downstream_datalist, select_percent, with_tertiles
from dinov2.data.overlap import warn_of_overlap
from dinov2.data.recipes import Recipe, load_recipe
from dinov2.data.skull import warn_of_skulls
from dinov2.data.workers import compute_in_order
from dinov2.distributed import barrier, gather_objects, is_main_process
from dinov2.distributed.runtime import Runtime, lost_rank_explained, start_runtime
from dinov2.errors import BadInput
from dinov2.eval.features import class_features
from dinov2.eval.linear_heads import LAYER_CHOICES
from dinov2.eval.segmentation_3d.inference import autocast
from dinov2.files import write_json, write_text
from dinov2.logging import setup_logging
from dinov2.logging.folder import run_folder
from dinov2.logging.provenance import RUN_FILE, run_record
from dinov2.models import DinoVisionTransformer3d
from dinov2.train.ssl_meta_arch import DTYPES

logger = logging.getLogger(__name__)

NOT_DECISIVE = {
    "output_dir",
    "cache_dir",
    "num_workers",
    "local_rank",
    "base_data_dir",
    "no_resume",
}  # a resume may change them


def frozen_parser(program: str, description: str) -> argparse.ArgumentParser:
    """The flags that every evaluation of features has."""
    parser = argparse.ArgumentParser(program, description=description)
    add = parser.add_argument
    add("--config-file", help="configuration the backbone was trained with (a YAML file or a name)")
    add("--pretrained-weights", required=True, help="teacher checkpoint, or the word random for an untrained network")
    add("--output-dir", required=True, help="folder of the run")
    add("--opts", nargs="*", default=[], metavar="key=value", help="configuration overrides")
    add("--dataset-name", required=True, help="a recipe: a name of configs/eval/datasets, or a YAML file")
    add("--dataset-percent", type=int, default=100, help="share of the training part that is used")
    add("--base-data-dir", required=True, help="folder of <dataset>_cls_datalist.json")
    add("--image-size", type=int, default=112, help="edge of the network's input (voxels)")
    add("--batch-size", type=int, default=32, help="images of a step and process")
    add("--num-workers", type=int, default=8, help="loader processes")
    add("--cache-dir", help="folder of prepared cases; default: cache, below --output-dir")
    add("--dataset-seed", type=int, default=0, help="of the training subset, of crops and of their order")
    add("--local-rank", type=int, default=0, help="accepted for old launchers, no effect")
    return parser


@dataclass(frozen=True)
class Setting:
    """What an evaluation works with.

    Attributes:
        cfg: The backbone's configuration.
        recipe: The dataset's, with all sizes and bins in numbers.
        cases: Of training, validation and test; all of the training part.
        output_dir: Of the run, held by its lock.
        runtime: Rank and device.
    """

    cfg: DictConfig
    recipe: Recipe
    cases: dict[str, Cases]
    output_dir: Path
    runtime: Runtime


@contextmanager
def open_setting(args: argparse.Namespace, task: str) -> Iterator[Setting]:
    """Check a command line and its data, and hold the output folder.

    Raises:
        BadInput: What of it cannot be used.
    """
    for flag in ("image_size", "batch_size"):
        if not getattr(args, flag) > 0:
            raise BadInput(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be positive")
    recipe = load_recipe(args.dataset_name)
    if recipe.task != task:
        raise BadInput(f"{args.dataset_name}: a recipe for {recipe.task}, not {task}: {_program_of(recipe.task)}")
    recipe = with_tertiles(recipe, args.base_data_dir)
    if recipe.resize is None:
        recipe = dataclasses.replace(recipe, resize=[args.image_size] * 3)
    cfg = load_and_merge_config_3d(args.config_file, args.opts)
    if args.image_size % cfg.student.patch_size:
        raise BadInput(f"--image-size {args.image_size} is not a multiple of student.patch_size={cfg.student.patch_size}")
    splits = read_downstream_datalist(args.base_data_dir, recipe)
    runtime = start_runtime(cfg.train.num_threads, cfg.train.backend, cfg.train.timeout_s)
    setup_logging(rank=runtime.rank)
    with lost_rank_explained(runtime.rank), run_folder(args.output_dir, runtime) as output_dir:
        setup_logging(output_dir, runtime.rank)
        for items in splits.values():
            check_headers(items, recipe)
        warn_of_skulls(splits["training"], recipe)
        cache = args.cache_dir or output_dir / "cache"
        cases = {part: Cases(items, recipe, cache_dir=cache) for part, items in splits.items()}
        check_same_run(args, cfg, recipe, output_dir, runtime)
        if args.pretrained_weights != "random" and is_main_process():
            warn_of_overlap([Entry(p, ()) for item in splits["test"] for p in item.images], args.pretrained_weights)
        logger.info("%s: %s cases", recipe.name, ", ".join(f"{len(items)} {part}" for part, items in splits.items()))
        yield Setting(cfg, recipe, cases, output_dir, runtime)


def _program_of(task: str) -> str:
    programs = {"segmentation": "segmentation3d.py", "classification": "linear3d.py", "regression": "regression.py"}
    return f"use dinov2/eval/{programs[task]}"


def check_same_run(args: argparse.Namespace, cfg: DictConfig, recipe: Recipe, output_dir: Path, runtime: Runtime) -> None:
    """Record what decides the result; refuse a folder whose run was decided otherwise.

    Raises:
        BadInput: The folder holds another run; what differs is named.
    """
    decisive: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in NOT_DECISIVE}
    decisive |= {"ranks": runtime.world_size, "config": default_yaml(cfg), "recipe": repr(recipe)}
    decisive["pretrained_weights"] = weights_id(args.pretrained_weights)
    decisive["datalist"] = hashlib.sha256(datalist_path(args.base_data_dir, recipe).read_bytes()).hexdigest()
    path = output_dir / "decisive.json"
    before = decisive
    if path.exists() and not getattr(args, "no_resume", False):
        before = json.loads(path.read_text())
    differing = sorted(k for k in before.keys() | decisive.keys() if before.get(k) != decisive.get(k))
    if differing:
        raise BadInput(f"{output_dir}: holds a run with another {', '.join(differing)}: use another --output-dir")
    if is_main_process():
        write_json(path, decisive)
        write_text(output_dir / "config.yaml", default_yaml(cfg))
        layout = {"ranks": runtime.world_size, "device": runtime.device.type}
        record = run_record(decisive["datalist"], 0, args.batch_size * runtime.world_size, layout)
        write_json(output_dir / RUN_FILE, record)
    barrier()


def weights_id(weights: str) -> str:
    """SHA-256 of a weights file, or the word random.

    Raises:
        BadInput: It cannot be read.
    """
    if weights == "random":
        return weights
    try:
        with Path(weights).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as err:
        raise BadInput(f"weights {weights}: {err.strerror}: give a teacher checkpoint") from err


def require_every_class(items: Sequence[Item], recipe: Recipe, part: str) -> None:
    """Raise `BadInput` where a part lacks one of the classes: it could be neither learnt nor scored."""
    if recipe.num_outputs < 2:
        raise BadInput(f"{recipe.name}: its recipe has one class only ({recipe.output_names[0]}): name two or more")
    present = {item.label for item in items}
    absent = [name for k, name in enumerate(recipe.output_names) if k not in present]
    if absent:
        advice = "split again, use a larger --dataset-percent, or leave the class out of the recipe"
        raise BadInput(f"{recipe.name}, {part}: none of its {len(items)} cases is {', '.join(absent)}: {advice}")


def training_items(cases: Cases, percent: int, seed: int) -> Cases:
    """A seed's own random subset of the training part."""
    items = select_percent(cases.items, percent, seed)
    folder = cases.cache.folder if cases.cache else None
    return Cases(items, cases.recipe, cache_dir=folder)


def feature_layers(backbone: DinoVisionTransformer3d) -> int:
    """Layers whose class tokens features hold: four, or all of a shallower network."""
    return min(max(LAYER_CHOICES), len(backbone.block_list))


def precision(cfg: DictConfig, device: torch.device) -> AbstractContextManager:
    """Mixed precision where the teacher's backbone has a half one and the device is a GPU."""
    return autocast(device, DTYPES[cfg.compute_precision.teacher.backbone.mixed_precision.param_dtype])


@torch.no_grad()
def part_features(
    setting: Setting, backbone: DinoVisionTransformer3d, cases: Cases, part: str, args: argparse.Namespace
) -> Tensor:
    """Features [n, F] of the middle of every case, on the CPU; the ranks share the work, every one has all.

    Raises:
        BadInput: A case cannot be prepared, or its features are not finite.
    """
    device, layers = setting.runtime.device, feature_layers(backbone)
    mine = list(range(setting.runtime.rank, len(cases), setting.runtime.world_size))
    endless = (mine[i % len(mine)] for i in range(10**12)) if mine else iter(())
    views = compute_in_order(lambda i: central_view(cases[i].image, args.image_size), endless, min(args.num_workers, len(mine)))
    rows = {}
    for first in tqdm(range(0, len(mine), args.batch_size), desc=f"{part} features", disable=None):
        chosen = mine[first : first + args.batch_size]
        images = torch.stack([next(views) for _ in chosen]).to(device)
        with precision(setting.cfg, device):
            found = class_features(backbone, images, layers).cpu()
        rows |= dict(zip(chosen, found, strict=True))
    views.close()
    rows = {i: row for of_rank in gather_objects(rows) for i, row in of_rank.items()}
    features = torch.stack([rows[i] for i in range(len(cases))])
    bad = (~features.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        name = cases.items[bad[0]].case
        raise BadInput(
            f"{part}: the features of {len(bad)} cases are not finite ({name}, ...): the weights are damaged or overflow"
        )
    return features


def labels_of(items: Sequence[Item]) -> Tensor:
    """Class numbers [n] int64, or values [n] float64 of a regression."""
    return torch.tensor([item.label for item in items])


def groups_of(items: Sequence[Item]) -> list[str]:
    """Patient of each case, the case itself where the list does not say."""
    return [item.patient or item.case for item in items]
