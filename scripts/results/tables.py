"""The tables and curves of docs/results.md from the folders of hippocampus.sh, brain_t1.sh and mini_study.sh.

    python scripts/results/tables.py hippocampus|brain_t1 FOLDER [--picture FILE.png]
    python scripts/results/tables.py study FOLDER          # of `dinov2 study report`: its comparison.csv

Prints Markdown. Intervals are of 2,000 bootstrap draws of test cases (people); differences are paired by case.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dinov2.eval.metrics.classification import auc_per_class
from dinov2.eval.metrics.statistics import bootstrap_interval

matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})

HEADS = ("ViTAdapterUNETR", "UNETR", "Linear")
LABELS = ("anterior", "posterior")
COLOURS = {"ViTAdapterUNETR": "tab:blue", "UNETR": "tab:green", "Linear": "tab:red"}
NETWORKS = ("trained", "untrained-0", "untrained-1", "untrained-2")


def with_interval(values: np.ndarray, digits: int = 3) -> str:
    """Mean and interval of values [cases]."""
    values = values[np.isfinite(values)]
    (interval,) = bootstrap_interval(lambda rows: [values[rows].mean()], [str(i) for i in range(len(values))])
    return f"{values.mean():.{digits}f} ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"


def hippocampus(folder: Path) -> list[str]:
    """A row for each head and backbone, then the differences."""
    names = [f"{head}-{weights}" for head in HEADS for weights in ("trained", "random")]
    names = [name for name in names if (folder / name / "results.json").exists()]
    tables = {name: pd.read_csv(folder / name / "per_case.csv") for name in names}
    values = {n: {c: t[t["class"] == c].set_index("case").sort_index() for c in LABELS} for n, t in tables.items()}
    lines = [
        "| head | backbone | iterations | Dice anterior | Dice posterior | HD95 mm | parameters trained | s a volume |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        results = json.loads((folder / name / "results.json").read_text())
        head, weights = name.split("-")
        dice = [with_interval(values[name][c].dice.to_numpy()) for c in LABELS]
        hd95 = np.mean([values[name][c].hd95_mm.mean() for c in LABELS])
        iterations, trained = results["iters_list"][-1] + 1, results["parameters_trained"] / 1e6
        backbone = "tiny teacher" if weights == "trained" else "untrained"
        lines.append(
            f"| {head} | {backbone} | {iterations} | {dice[0]} | {dice[1]} | {hd95:.2f} | {trained:.2f} M "
            f"| {results['seconds_per_volume']:.2f} |"
        )
    lines.append("")
    for head in (h for h in HEADS if {f"{h}-trained", f"{h}-random"} <= set(names)):
        gains = [values[f"{head}-trained"][c].dice - values[f"{head}-random"][c].dice for c in LABELS]
        lines.append(f"{head}, teacher - untrained: " + ", ".join(with_interval(g.to_numpy()) for g in gains))
    return lines


def draw_hippocampus(folder: Path, path: Path) -> None:
    """Validation Dice of the two labels against the iteration."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for head in HEADS:
        for weights, style in (("trained", "-"), ("random", "--")):
            file = folder / f"{head}-{weights}" / "results.json"
            if file.exists():
                results = json.loads(file.read_text())
                dice = [np.mean(row[1:]) for row in results["val_per_cls_dice_list"]]
                label = f"{head}, {'tiny teacher' if weights == 'trained' else 'untrained'}"
                axis.plot(np.array(results["iters_list"]) + 1, dice, style, color=COLOURS[head], label=label)
    axis.axhline((0.750 + 0.708) / 2, color="black", ls=":", lw=1)
    axis.text(1000, (0.750 + 0.708) / 2 + 0.01, "a mean label map on each case", fontsize=8)
    axis.set(xlabel="iterations of 4 crops", ylabel="validation Dice, mean of two labels", ylim=(0, 0.9))
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def seeds_of(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.glob("seed*")) if (p / "predictions.csv").exists()] or [folder]


def brain_t1(folder: Path) -> list[str]:
    """Test AUC (mean of the seeds) of the probes, error and r of the regression."""
    lines = ["| task | backbone | test | of the seeds |", "| --- | --- | --- | --- |"]
    for task in ("sex", "age_group"):
        for network in NETWORKS[:2]:
            tables = [pd.read_csv(p / "predictions.csv") for p in seeds_of(folder / f"{task}-{network}")]
            classes = [c for c in tables[0] if c.startswith("p_")]
            labels = tables[0].label.map({c[2:]: k for k, c in enumerate(classes)}).to_numpy()
            scores = [t[classes].to_numpy() for t in tables]

            def mean_auc(rows: np.ndarray, scores: list = scores, labels: np.ndarray = labels) -> list[float]:
                return [float(np.mean([np.mean(auc_per_class(s[rows], labels[rows])) for s in scores]))]

            everyone = np.arange(len(labels))
            (interval,) = bootstrap_interval(mean_auc, [str(i) for i in everyone])
            each = ", ".join(f"{np.mean(auc_per_class(s, labels)):.2f}" for s in scores)
            shown = "no interval" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
            lines.append(f"| {task} AUC | {network} | {mean_auc(everyone)[0]:.3f} ({shown}) | {each} |")
    for network in NETWORKS:
        table = pd.read_csv(folder / f"age-{network}" / "predictions.csv")
        error = (table.predicted - table.label).abs().to_numpy()
        results = json.loads((folder / f"age-{network}" / "results.json").read_text())
        lines.append(
            f"| age, mean absolute error in years | {network} | {with_interval(error, 2)} | r {results['test_r']:.2f}; "
            f"the median's {results['median_mae']:.2f} |"
        )
    return lines


def study(folder: Path) -> list[str]:
    """Of each data set and metric: means of all methods, then the subject's differences, a column for each share of labels."""
    table = pd.read_csv(folder / "comparison.csv").fillna({"minus": ""})
    table = table[table["class"].isin(["mean of classes", "all"])]
    lines: list[str] = []
    for (dataset, metric), rows in table[table.metric.isin(["dice", "hd95_mm", "auc"])].groupby(
        ["dataset", "metric"], sort=False
    ):
        percents = sorted(rows.percent.unique())
        lines += [f"{dataset}, {metric}", "", "| | " + " | ".join(f"{p:g} %" for p in percents) + " |"]
        lines.append("| --- " * (len(percents) + 1) + "|")
        for (run, minus), own in rows.groupby(["run", "minus"], sort=False):
            cells = []
            for percent in percents:
                found = own[own.percent == percent].to_dict("records")
                cells.append(_study_cell(found[0]) if found else "")
            lines.append(f"| {run}{f' - {minus}' if minus else ''} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _study_cell(row: dict) -> str:
    sign = "+" if row["minus"] else ""
    digits = 2 if row["metric"] == "hd95_mm" else 3
    text = f"{row['mean']:{sign}.{digits}f}"
    if row["bootstrap_low"] == row["bootstrap_low"]:
        text += f" ({row['bootstrap_low']:{sign}.{digits}f} to {row['bootstrap_high']:{sign}.{digits}f})"
    return text + (f", p = {row['p_holm']:.2g}" if row["minus"] and row["p_holm"] == row["p_holm"] else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("hippocampus", "brain_t1", "study"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    print("\n".join({"hippocampus": hippocampus, "brain_t1": brain_t1, "study": study}[args.table](args.folder)))
    if args.picture and args.table == "hippocampus":
        draw_hippocampus(args.folder, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
