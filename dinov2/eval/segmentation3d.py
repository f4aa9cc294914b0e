"""Train and test a segmentation on a downstream dataset: `python dinov2/eval/segmentation3d.py --dataset-name D ...`.

Reading order: `main` -> `run` (what a run needs) -> `segmentation_3d/engine.py` (the loop and the test).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # started as a file: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from dinov2.start import start_program  # its package comes before torch and decides how threads wait

    start_program()

from dinov2.data.downstream.cases import Cases
from dinov2.distributed import barrier
from dinov2.distributed.runtime import Runtime
from dinov2.errors import EXIT_OK
from dinov2.eval.methods.flags import complete
from dinov2.eval.methods.registry import HEADS
from dinov2.eval.run import Request, checked_request, eval_parser, open_run, require_positive
from dinov2.eval.segmentation_3d import engine
from dinov2.eval.segmentation_3d.batches import prepare_all
from dinov2.eval.segmentation_3d.build import Task, build_segmentation, load_segmentation
from dinov2.geometry import Edges
from dinov2.program import run_program

logger = logging.getLogger("dinov2.eval.segmentation3d")


def get_args_parser() -> argparse.ArgumentParser:
    """3DINO's flags, with the paper's values as defaults; those that are its methods' are None until `complete`."""
    batch = "cases a step and process, each gives the recipe's crops_per_volume; default: the method's"
    parser = eval_parser("segmentation3d.py", "Segmentation on a downstream dataset.", "100", None, batch, has_methods=True)
    add = parser.add_argument
    add("--segmentation-head", choices=HEADS, help="default: the method's; of 3DINO ViTAdapterUNETR")
    whole = "train the backbone too, as methods that start from nothing do"
    add("--train-feature-model", action="store_true", default=None, help=whole)
    add("--epochs", type=int, default=100, help="epochs of --epoch-length iterations")
    add("--epoch-length", type=int, default=300, help="iterations of an epoch")
    add("--eval-iters", type=int, default=600, help="iterations between two validations")
    add("--warmup-iters", type=int, default=3000, help="iterations of the linear warm-up")
    add("--resize-scale", type=float, default=1.0, help="divides the recipe's spacing")
    add("--learning-rate", type=float, help="peak learning rate; default, the paper's: 1e-4, of a Linear head 1e-3")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn a user's mistake into one line and exit code 2."""
    return run_program(run, get_args_parser(), argv)


def run(args: argparse.Namespace) -> int:
    """Everything around the loop: recipe, data, ranks, folder, network, resume, test."""
    request, plan, head = check_arguments(args)
    with open_run(request, "segmentation", head.resize_scale) as setting:
        cfg, runtime, output_dir = setting.cfg, setting.runtime, setting.output_dir
        task = Task(setting.recipe, head.name, request.image_size, head.resize_scale, request.model_name, request.plan)
        model = build_segmentation(cfg, setting.encoder, task, plan.train_backbone, runtime)
        prepare(setting.cases, request.image_size, runtime)
        setting.begin()
        state = engine.start_run(model, cfg, plan, output_dir, runtime)
        if (output_dir / "results.json").exists() and state.iteration + 1 >= plan.total_iters:
            logger.info("%s: finished already, see results.json", output_dir)
            return EXIT_OK
        code = engine.train(state, cfg, task, plan, setting.cases, request.dataset_seed, runtime)
        barrier()
        if code == EXIT_OK:
            best, _, _ = load_segmentation(output_dir / engine.BEST, runtime, request.model_name)
            engine.test(best, cfg, task, setting.cases["test"], state, runtime)
        return code


class Head(NamedTuple):
    """Which decoder, and what divides the spacing of the cases it sees."""

    name: str
    resize_scale: float


def check_arguments(args: argparse.Namespace) -> tuple[Request, engine.Plan, Head]:
    """Request, plan and decoder of a command line.

    Raises:
        BadInput: Something of it cannot be used.
    """
    for flag in ("epochs", "epoch_length", "eval_iters", "resize_scale", "learning_rate", "image_size"):
        require_positive(**{flag: getattr(args, flag)})
    args = complete(args)
    request = checked_request(args)
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
    return request, plan, Head(args.segmentation_head, args.resize_scale)


def prepare(cases: dict[str, Cases], image_size: Edges, runtime: Runtime) -> None:
    """Every case prepared into the cache before the first iteration."""
    for part, of_part in cases.items():
        prepare_all(of_part, image_size, part, runtime)
    barrier()


if __name__ == "__main__":
    sys.exit(main())
