"""Linear probing of a frozen backbone on a classification: `python dinov2/eval/linear3d.py --dataset-name D ...`.

Reading order: `main` -> `run` -> `run_seed` -> `probe_training.py` (the loop) -> `test`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from dinov2.start import start_program  # its package comes before torch and decides how threads wait

    start_program()

from torch import Tensor

from dinov2.data.downstream.cases import Cases
from dinov2.data.downstream.lists import SPLITS
from dinov2.distributed import barrier, is_main_process
from dinov2.errors import EXIT_OK, BadInput
from dinov2.eval.methods.flags import complete
from dinov2.eval.metrics.classification import classification_scores, write_predictions
from dinov2.eval.probing import training
from dinov2.eval.probing.linear_heads import LEARNING_RATES, LinearClassifier  # noqa: F401 - DINOv2's place of the second
from dinov2.eval.probing.parts import groups_of, labels_of, part_features, require_every_class, training_items
from dinov2.eval.probing.saved_probe import save_probe
from dinov2.eval.run import Request, Setting, checked_request, frozen_parser, open_run, require_positive
from dinov2.files import write_json
from dinov2.program import run_program

logger = logging.getLogger("dinov2.eval.linear3d")


def get_args_parser() -> argparse.ArgumentParser:
    """3DINO's flags, with the paper's values as defaults; ours come last."""
    parser = frozen_parser("linear3d.py", "Linear probing on a downstream dataset.", has_methods=True)
    add = parser.add_argument
    add("--epochs", type=int, default=100, help="epochs of --epoch-length iterations")
    add("--epoch-length", type=int, default=125, help="iterations of an epoch")
    add("--save-checkpoint-frequency", type=int, default=20, help="epochs between two checkpoints")
    add("--eval-period-iterations", type=int, default=1250, help="iterations between two validations")
    rates = "learning rates of the grid; default: the paper's, 1e-4 to 0.5"
    add("--learning-rates", type=float, nargs="+", default=list(LEARNING_RATES), metavar="RATE", help=rates)
    add("--classifier-fpath", help="checkpoint.pth of another run, whose heads this one begins with")
    add("--scale-learning-rates", action="store_true", help="rates times batch / 256, as DINOv2")
    views = "augmented views of each training case whose features are kept, instead of a new view in every iteration (0)"
    add("--cached-views", type=int, default=0, help=views)
    add("--num-seeds", type=int, default=1, help="repeat with --dataset-seed, +1, ..., each with its own training subset")
    add("--fine-tune", action="store_true", help="train the backbone too, by the heads' mean loss (AdamW)")
    add("--backbone-learning-rate", type=float, default=1e-5, help="of --fine-tune, at the start of the cosine")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(run, get_args_parser(), argv)


def run(args: argparse.Namespace) -> int:
    """Every seed in turn; features of a frozen backbone are extracted once for all."""
    request, plan, seeds = check_arguments(args)
    with open_run(request, "classification") as setting:
        for part in SPLITS:
            require_every_class(setting.cases[part].items, setting.recipe, part)
        subsets = {s: training_items(setting.cases["training"], request.dataset_percent, s) for s in seeds}
        for seed, cases in subsets.items():
            require_every_class(cases.items, setting.recipe, f"training, {request.dataset_percent} % by seed {seed}")
        if plan.classifier:  # one that does not fit is refused now
            training.start_probe(setting, setting.backbone, plan, seeds[0])
        setting.begin()
        held_out: dict[str, Tensor] = {}
        for seed, cases in subsets.items():
            folder = setting.output_dir / f"seed_{seed}" if len(seeds) > 1 else setting.output_dir
            folder.mkdir(exist_ok=True)
            if (folder / "results.json").exists():
                logger.info("%s: finished already", folder)
                continue
            code = run_seed(plan, dataclasses.replace(setting, output_dir=folder), cases, seed, held_out)
            if code != EXIT_OK:
                return code
        if len(seeds) > 1 and is_main_process():
            training.summarise_seeds(setting.output_dir, list(subsets))
        return EXIT_OK


def check_arguments(args: argparse.Namespace) -> tuple[Request, training.Plan, range]:
    """The request, plan and seeds of a command line.

    Raises:
        BadInput: Something of it cannot be used.
    """
    args = complete(args)
    request = checked_request(args)
    for flag in ("epochs", "epoch_length", "save_checkpoint_frequency", "eval_period_iterations", "num_seeds"):
        require_positive(**{flag: getattr(args, flag)})
    if not min(args.learning_rates) > 0 or len(set(args.learning_rates)) < len(args.learning_rates):
        raise BadInput(f"--learning-rates {' '.join(f'{r:g}' for r in args.learning_rates)}: must be positive, each once")
    if args.fine_tune and args.cached_views:
        raise BadInput("--cached-views keeps features of a frozen backbone: leave it out with --fine-tune")
    plan = training.Plan(
        total_iters=args.epochs * args.epoch_length,
        save_iters=args.save_checkpoint_frequency * args.epoch_length,
        eval_iters=args.eval_period_iterations,
        learning_rates=tuple(args.learning_rates),
        scale_rates=args.scale_learning_rates,
        cached_views=args.cached_views,
        backbone_rate=args.backbone_learning_rate if args.fine_tune else None,
        classifier=args.classifier_fpath,
    )
    return request, plan, range(args.dataset_seed, args.dataset_seed + args.num_seeds)


def run_seed(plan: training.Plan, setting: Setting, cases: Cases, seed: int, held_out: dict[str, Tensor]) -> int:
    """Train, select and test with one seed; returns the exit code.

    Args:
        held_out: Features of validation and test by part: filled by the first seed, used by the next ones.
    """
    is_trained = plan.backbone_rate is not None
    backbone = copy.deepcopy(setting.backbone) if is_trained else setting.backbone

    def features(part: str) -> Tensor:
        if is_trained:  # they change with the backbone
            return part_features(setting, backbone, setting.cases[part], part)
        if part not in held_out:
            held_out[part] = part_features(setting, backbone, setting.cases[part], part)
        return held_out[part]

    state = training.start_probe(setting, backbone, plan, seed)
    state.resume()
    code = training.train(setting, state, plan, cases, seed, lambda: features("validation"))
    if code != EXIT_OK:
        return code
    best = state.best_head()
    if is_main_process():
        save_probe(setting, state, best)
    test_features = features("test")  # for the first time, when everything is chosen
    if is_main_process():
        test(setting, state, best, test_features, len(cases), seed)
    barrier()
    return EXIT_OK


def test(setting: Setting, state: training.Probe, best: int, features: Tensor, n_train: int, seed: int) -> None:
    """Score the selected head on the test part; writes `predictions.csv`, then `results.json`."""
    items, names = setting.cases["test"].items, setting.recipe.output_names
    logits = state.heads.logits(features.to(setting.runtime.device))[:, best]
    probabilities = logits.double().softmax(-1).cpu().numpy()
    labels = labels_of(items).numpy()
    columns = {f"p_{name}": probabilities[:, k] for k, name in enumerate(names)}
    write_predictions(setting.output_dir / "predictions.csv", [i.case for i in items], [names[k] for k in labels], columns)
    results = {
        **classification_scores(probabilities, labels, groups_of(items)),
        "classes": names,
        "best_head": state.heads.heads[best].name,
        "validation": state.history,
        "seed": seed,
        "percent": setting.request.dataset_percent,
        "n_train": n_train,
        "n_test": len(items),
    }
    write_json(setting.output_dir / "results.json", results)
    auc, interval = results["test_auc"], results["test_auc_ci95"]
    shown = "" if interval is None else f" (95 % interval {interval[0]:.3f} to {interval[1]:.3f})"
    logger.info("seed %d: test AUC %.4f%s, head %s", seed, auc, shown, results["best_head"])


if __name__ == "__main__":
    sys.exit(main())
