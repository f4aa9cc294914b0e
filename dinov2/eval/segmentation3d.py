"""Train and test a segmentation on a downstream dataset: `python dinov2/eval/segmentation3d.py --dataset-name D ...`.

Reading order: `main` -> `run` (what a run needs) -> `segmentation_3d/engine.py` (the loop and the test).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from omegaconf import DictConfig

from dinov2.configs import default_yaml, load_and_merge_config_3d
from dinov2.data.cases import Cases, check_headers
from dinov2.data.datalist import Entry
from dinov2.data.downstream import Item, datalist_path, read_downstream_datalist, select_percent
from dinov2.data.overlap import warn_of_overlap
from dinov2.data.recipes import Recipe, load_recipe
from dinov2.distributed import barrier, is_main_process
from dinov2.distributed.runtime import Runtime, lost_rank_explained, start_runtime
from dinov2.errors import EXIT_OK, BadInput
from dinov2.eval.segmentation_3d import engine
from dinov2.eval.segmentation_3d.batches import prepare_all
from dinov2.eval.segmentation_3d.build import HEADS, Task, build_segmentation, load_segmentation
from dinov2.files import write_json, write_text
from dinov2.logging import setup_logging
from dinov2.logging.folder import run_folder
from dinov2.logging.provenance import RUN_FILE, run_record
from dinov2.program import run_program

logger = logging.getLogger("dinov2.eval.segmentation3d")

MODELS = ("3DINO", "MONAI-ViT", "SwinTransfer", "SwinRandom", "Random")
NOT_DECISIVE = {"output_dir", "cache_dir", "num_workers", "local_rank", "base_data_dir"}  # a resume may change them


def get_args_parser() -> argparse.ArgumentParser:
    """3DINO's flags, with the paper's values as defaults."""
    parser = argparse.ArgumentParser("segmentation3d.py", description="Segmentation on a downstream dataset.")
    add = parser.add_argument
    add("--config-file", help="configuration the backbone was trained with (a YAML file or a name)")
    add("--pretrained-weights", required=True, help="teacher checkpoint, or the word random for an untrained network")
    add("--output-dir", required=True, help="folder of the run")
    add("--opts", nargs="*", default=[], metavar="key=value", help="configuration overrides")
    add("--dataset-name", required=True, help="a recipe: a name of configs/eval/datasets, or a YAML file")
    add("--dataset-percent", type=int, default=100, help="share of the training part that is used")
    add("--base-data-dir", required=True, help="folder of <dataset>_100_datalist.json")
    add("--segmentation-head", choices=HEADS, default="ViTAdapterUNETR")
    add("--train-feature-model", action="store_true", help="train the backbone too")
    add("--epochs", type=int, default=100, help="epochs of --epoch-length iterations")
    add("--epoch-length", type=int, default=300, help="iterations of an epoch")
    add("--eval-iters", type=int, default=600, help="iterations between two validations")
    add("--warmup-iters", type=int, default=3000, help="iterations of the linear warm-up")
    add("--image-size", type=int, default=112, help="edge of crops and windows (voxels)")
    add("--resize-scale", type=float, default=1.0, help="divides the recipe's spacing")
    add("--batch-size", type=int, default=2, help="cases a step and process; each gives the recipe's crops_per_volume")
    add("--num-workers", type=int, default=8, help="loader processes")
    add("--learning-rate", type=float, default=1e-4, help="peak learning rate (the paper's: 1e-4; Linear 1e-3)")
    add("--cache-dir", help="folder of prepared cases; default: cache, below --output-dir")
    add("--dataset-seed", type=int, default=0, help="of crops and their order")
    add("--model-name", choices=MODELS, default="3DINO")
    add("--local-rank", type=int, default=0, help="accepted for old launchers, no effect")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn a user's mistake into one line and exit code 2."""
    return run_program(run, get_args_parser().parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Everything around the loop: recipe, data, ranks, folder, network, resume, test."""
    recipe, plan, cfg = check_arguments(args)
    splits = read_downstream_datalist(args.base_data_dir, recipe)
    splits["training"] = select_percent(splits["training"], args.dataset_percent)
    runtime = start_runtime(cfg.train.num_threads, cfg.train.backend, cfg.train.timeout_s)
    setup_logging(rank=runtime.rank)
    with lost_rank_explained(runtime.rank), run_folder(args.output_dir, runtime) as output_dir:
        setup_logging(output_dir, runtime.rank)
        cases = prepare(args, recipe, splits, output_dir, runtime)
        task = Task(recipe, args.segmentation_head, args.image_size, args.resize_scale)
        model = build_segmentation(cfg, args.pretrained_weights, task, args.train_feature_model, runtime)
        check_same_run(args, cfg, recipe, output_dir, runtime)
        state = engine.start_run(model, cfg, plan, output_dir, runtime)
        if (output_dir / "results.json").exists() and state.iteration + 1 >= plan.total_iters:
            logger.info("%s: finished already, see results.json", output_dir)
            return EXIT_OK
        code = engine.train(state, cfg, task, plan, cases, args.dataset_seed, runtime)
        barrier()
        if code == EXIT_OK:
            best, _, _ = load_segmentation(output_dir / engine.BEST, runtime)
            engine.test(best, cfg, task, cases["test"], state, runtime)
        return code


def check_arguments(args: argparse.Namespace) -> tuple[Recipe, engine.Plan, DictConfig]:
    """Recipe, plan and configuration of a command line.

    Raises:
        BadInput: Something of it cannot be used.
    """
    if args.model_name != "3DINO":
        raise BadInput(f"--model-name {args.model_name}: this baseline is not part of this version: use 3DINO")
    for flag in ("epochs", "epoch_length", "eval_iters", "image_size", "batch_size", "resize_scale", "learning_rate"):
        if not getattr(args, flag) > 0:
            raise BadInput(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be positive")
    recipe = load_recipe(args.dataset_name)
    if recipe.task != "segmentation":
        raise BadInput(f"{args.dataset_name}: a recipe for {recipe.task}: use dinov2/eval/linear3d.py")
    cfg = load_and_merge_config_3d(args.config_file, args.opts)
    plan = engine.Plan(
        total_iters=args.epochs * args.epoch_length,
        warmup_iters=min(args.warmup_iters, args.epochs * args.epoch_length),
        eval_iters=args.eval_iters,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        train_backbone=args.train_feature_model,
        num_workers=args.num_workers,
    )
    if plan.warmup_iters < args.warmup_iters:
        logger.warning("--warmup-iters %d is longer than the run: cut to %d", args.warmup_iters, plan.warmup_iters)
    return recipe, plan, cfg


def prepare(
    args: argparse.Namespace, recipe: Recipe, splits: dict[str, list[Item]], output_dir: Path, runtime: Runtime
) -> dict[str, Cases]:
    """Every case checked and prepared into the cache before the first iteration."""
    cache = args.cache_dir or output_dir / "cache"
    for items in splits.values():
        check_headers(items, recipe)
    cases = {part: Cases(items, recipe, args.resize_scale, cache) for part, items in splits.items()}
    for part, of_part in cases.items():
        prepare_all(of_part, args.image_size, part, runtime)
    barrier()
    if args.pretrained_weights != "random" and is_main_process():
        warn_of_overlap([Entry(path, ()) for item in splits["test"] for path in item.images], args.pretrained_weights)
    counts = ", ".join(f"{len(of_part)} {part}" for part, of_part in cases.items())
    logger.info("%s: %s cases; %s", recipe.name, counts, ", ".join(recipe.output_names))
    return cases


def check_same_run(args: argparse.Namespace, cfg: DictConfig, recipe: Recipe, output_dir: Path, runtime: Runtime) -> None:
    """Record what decides the result; refuse a folder whose run was decided otherwise.

    Raises:
        BadInput: The folder holds another run; the first differences are named.
    """
    weights = Path(args.pretrained_weights)
    decisive: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in NOT_DECISIVE}
    decisive |= {"ranks": runtime.world_size, "config": default_yaml(cfg), "recipe": repr(recipe)}
    if args.pretrained_weights != "random":
        decisive["pretrained_weights"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    listed = datalist_path(args.base_data_dir, recipe).read_bytes()
    decisive["datalist"] = hashlib.sha256(listed).hexdigest()
    path = output_dir / "decisive.json"
    before = json.loads(path.read_text()) if path.exists() else decisive
    differing = sorted(k for k in before.keys() | decisive.keys() if before.get(k) != decisive.get(k))
    if differing:
        raise BadInput(f"{output_dir}: holds a run with another {', '.join(differing)}: use another --output-dir")
    if is_main_process():
        write_json(path, decisive)
        write_text(output_dir / "config.yaml", default_yaml(cfg))
        layout = {"ranks": runtime.world_size, "device": runtime.device.type}
        batch = args.batch_size * runtime.world_size
        write_json(output_dir / RUN_FILE, run_record(decisive["datalist"], 0, batch, layout))


if __name__ == "__main__":
    sys.exit(main())
