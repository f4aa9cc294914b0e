"""Ridge regression of a number, such as age, on frozen features: `python dinov2/eval/regression.py --dataset-name D ...`.

The penalty and the part of the features are chosen by the validation part's mean absolute error; then the regression is fitted
anew on training and validation.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from dinov2.start import start_program  # its package comes before torch and decides how threads wait

    start_program()

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from dinov2.distributed import is_main_process
from dinov2.errors import EXIT_OK
from dinov2.eval.metrics.classification import regression_scores, write_predictions
from dinov2.eval.probing.choice import all_features, choose, write_results
from dinov2.eval.probing.parts import groups_of
from dinov2.eval.run import checked_request, frozen_parser, open_run
from dinov2.program import run_program

logger = logging.getLogger("dinov2.eval.regression")

PENALTIES = tuple(10.0**power for power in range(-2, 8))


def get_args_parser() -> argparse.ArgumentParser:
    return frozen_parser("regression.py", "Ridge regression on a downstream dataset.")


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(run, get_args_parser(), argv)


def run(args: argparse.Namespace) -> int:
    with open_run(checked_request(args), "regression") as setting:
        parts, choices = all_features(setting)
        fit, validation, test = (parts[name] for name in ("training", "validation", "test"))

        def fitted(x: np.ndarray, y: np.ndarray, penalty: float) -> Pipeline:
            return make_pipeline(StandardScaler(), Ridge(alpha=penalty)).fit(x, y)

        scores = {}
        for name, columns in choices.items():
            for penalty in PENALTIES:
                predicted = fitted(fit.x[:, columns], fit.y, penalty).predict(validation.x[:, columns])
                scores[name, penalty] = -float(np.abs(predicted - validation.y).mean())
        taken, penalty = choose(scores)
        both = np.concatenate([fit.x[:, choices[taken]], validation.x[:, choices[taken]]])
        values = np.concatenate([fit.y, validation.y])
        predicted = fitted(both, values, penalty).predict(test.x[:, choices[taken]])
        if is_main_process():
            cases = [item.case for item in test.items]
            write_predictions(setting.output_dir / "predictions.csv", cases, test.y.tolist(), {"predicted": predicted})
            results = regression_scores(predicted, test.y, groups_of(test.items))
            results["median_mae"] = float(np.abs(np.median(values) - test.y).mean())  # always answering the median
            write_results(setting, results, parts, {"features": taken, "penalty": penalty}, scores)
            error, median = results["test_mae"], results["median_mae"]
            logger.info("test: mean absolute error %.3f, by the median %.3f, r %.3f", error, median, results["test_r"])
        return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
