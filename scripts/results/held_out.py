"""The losses of a `train.objective=swin` run on volumes that it did not see: a row a teacher checkpoint, as CSV.

    python scripts/results/held_out.py RUN --datalist HELD_OUT.json --output held_out.csv

Views are drawn by the run's seed, the same for every row, so that rows differ by their weights alone.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from dinov2.checkpointer.teacher import read_weights
from dinov2.configs import load_and_merge_config_3d
from dinov2.data import TrainLoader, read_datalist
from dinov2.errors import EXIT_OK, BadInput
from dinov2.files import replacing
from dinov2.models.weights import load_backbone, load_heads
from dinov2.program import run_program
from dinov2.streams import Kind, torch_seed
from dinov2.train.swin_meta_arch import SwinMetaArch

FIELDS = ("rotation_loss", "contrastive_loss", "reconstruction_loss", "total_loss", "rotation_accuracy")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("held_out.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished or running training")
    parser.add_argument("--datalist", required=True, help="volumes that the run does not train on")
    parser.add_argument("--output", required=True, type=Path, help="CSV to write")
    parser.add_argument("--batches", type=int, default=16, help="of the run's batch size")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(write_table, get_args_parser(), argv)


def write_table(args: argparse.Namespace) -> int:
    rows = held_out_losses(args.run, args.datalist, args.batches)
    with replacing(args.output) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, ("iteration", *FIELDS))
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return EXIT_OK


def held_out_losses(run: Path, datalist: str, num_batches: int) -> list[dict[str, float]]:
    """A row a teacher checkpoint, in the order of training, the untrained network first (iteration -1).

    Raises:
        BadInput: The run has no teacher, or another objective.
    """
    teachers = sorted(run.glob("eval/training_*/teacher_checkpoint.pth"), key=lambda p: int(p.parent.name.split("_")[1]))
    if not teachers:
        raise BadInput(f"{run}: no eval/training_*/teacher_checkpoint.pth: give the folder of a training")
    cfg = load_and_merge_config_3d(
        run / "config.yaml", ["train.num_workers=0", "train.accumulation_steps=1", "train.cache_dir="]
    )
    if cfg.train.objective != "swin":
        raise BadInput(f"{run}: has train.objective={cfg.train.objective}: give a run of swin")
    torch.manual_seed(torch_seed(cfg.train.seed, Kind.INIT, 0))
    model = SwinMetaArch(cfg).eval()
    batches = [step[0] for step in islice(iter(TrainLoader(cfg, read_datalist(datalist))), num_batches)]
    rows = [{"iteration": -1, **mean_losses(model, batches)}]
    for path in teachers:
        weights = read_weights(path)
        load_backbone(model.student.backbone, weights, path)
        load_heads({"swin_head": model.student["swin_head"]}, weights, path)
        rows.append({"iteration": int(path.parent.name.split("_")[1]), **mean_losses(model, batches)})
    return rows


@torch.no_grad()
def mean_losses(model: SwinMetaArch, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    losses = [model.losses(batch)[0] for batch in batches]
    return {name: float(torch.stack([of_batch[name] for of_batch in losses]).mean()) for name in FIELDS}


if __name__ == "__main__":
    sys.exit(main())
