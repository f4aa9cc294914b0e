"""Logistic regression on frozen features: `python dinov2/eval/log_regression.py --dataset-name D ...`.

C and the part of the features are chosen by the validation part, as in DINOv2's evaluation; then the regression is fitted anew
on training and validation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from dinov2.start import start_program  # its package comes before torch and decides how threads wait

    start_program()

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dinov2.errors import EXIT_OK
from dinov2.eval.probing.choice import all_features, choose, mean_auc, write_classification
from dinov2.eval.run import checked_request, frozen_parser, open_run
from dinov2.program import run_program

C_GRID = tuple(np.logspace(-6, 5, 45).tolist())  # DINOv2's
MAX_ITERATIONS = 1000


def get_args_parser() -> argparse.ArgumentParser:
    return frozen_parser("log_regression.py", "Logistic regression on a downstream dataset.")


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(run, get_args_parser(), argv)


def run(args: argparse.Namespace) -> int:
    with open_run(checked_request(args), "classification") as setting:
        parts, choices = all_features(setting)
        fit, validation, test = (parts[name] for name in ("training", "validation", "test"))

        def fitted(x: np.ndarray, y: np.ndarray, c: float) -> LogisticRegression:
            return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=MAX_ITERATIONS)).fit(x, y)

        scores = {}
        for name, columns in choices.items():
            for c in C_GRID:
                model = fitted(fit.x[:, columns], fit.y, c)
                scores[name, c] = mean_auc(model.predict_proba(validation.x[:, columns]), validation)
        taken, c = choose(scores)
        both = np.concatenate([fit.x[:, choices[taken]], validation.x[:, choices[taken]]])
        model = fitted(both, np.concatenate([fit.y, validation.y]), c)
        probabilities = model.predict_proba(test.x[:, choices[taken]])
        write_classification(setting, parts, probabilities, {"features": taken, "C": c}, scores)
        return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
