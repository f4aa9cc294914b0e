"""Weighted k nearest neighbours on frozen features: `python dinov2/eval/knn.py --dataset-name D ...`.

Neighbours by cosine similarity, each voting with exp(similarity / temperature), as DINOv2's evaluation. Unlike there, k and the
part of the features are chosen by the validation part.
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

import numpy as np

from dinov2.errors import EXIT_OK, BadInput
from dinov2.eval.probing.choice import all_features, choose, mean_auc, write_classification
from dinov2.eval.probing.neighbours import TEMPERATURE, knn_probabilities
from dinov2.eval.run import Request, checked_request, frozen_parser, open_run
from dinov2.program import run_program

logger = logging.getLogger("dinov2.eval.knn")

NEIGHBOURS = (5, 10, 20, 50, 100, 200)


def get_args_parser() -> argparse.ArgumentParser:
    parser = frozen_parser("knn.py", "Weighted k nearest neighbours on a downstream dataset.")
    parser.add_argument("--nb_knn", "--nb-knn", type=int, nargs="+", default=list(NEIGHBOURS), help="numbers of neighbours")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="of the votes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(run, get_args_parser(), argv)


class Votes(NamedTuple):
    """Numbers of neighbours to choose from, and how sharply the near ones count more."""

    neighbours: tuple[int, ...]
    temperature: float


def check_arguments(args: argparse.Namespace) -> tuple[Request, Votes]:
    """The request and votes of a command line.

    Raises:
        BadInput: Something of it cannot be used.
    """
    if min(args.nb_knn) < 1 or args.temperature <= 0:
        raise BadInput("--nb_knn and --temperature must be positive")
    return checked_request(args), Votes(tuple(args.nb_knn), args.temperature)


def run(args: argparse.Namespace) -> int:
    request, votes = check_arguments(args)
    with open_run(request, "classification") as setting:
        parts, choices = all_features(setting)
        fit, num_classes = parts["training"], setting.recipe.num_outputs

        def vote(part: str, taken: str, k: int) -> np.ndarray:
            columns = choices[taken]
            return knn_probabilities(fit.x[:, columns], fit.y, parts[part].x[:, columns], k, num_classes, votes.temperature)

        numbers = sorted({min(k, len(fit.y)) for k in votes.neighbours})
        validation = parts["validation"]
        scores = {(v, k): mean_auc(vote("validation", v, k), validation) for v in choices for k in numbers}
        taken, k = choose(scores)
        write_classification(setting, parts, vote("test", taken, k), {"features": taken, "k": k}, scores)
        return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
