"""What the quick start draws: curves of the training, patches in colour, the read-out as bars."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})

COLOURS = {"demo encoder": "tab:green", "trained": "tab:blue", "untrained": "tab:orange", "raw patch": "tab:gray"}


def draw_curves(rows: list[dict[str, float]], prototypes: tuple[int, int], path: Path) -> None:
    """Losses, entropies, and the collapse monitors against the iteration.

    Args:
        rows: Lines of `training_metrics.json`.
        prototypes: K of the DINO and the iBOT head, for the lines at log K.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    steps = [r["iteration"] for r in rows]

    def line(axis: matplotlib.axes.Axes, name: str, label: str, colour: str) -> None:
        axis.plot(steps, [r[name] for r in rows], label=label, color=colour)

    line(axes[0], "dino_cross_entropy", "DINO (image)", "tab:blue")
    line(axes[0], "ibot_cross_entropy", "iBOT (patches)", "tab:green")
    for k, colour in zip(prototypes, ("tab:blue", "tab:green"), strict=True):
        axes[0].axhline(math.log(k), color=colour, ls=":", lw=1)
    axes[0].set_title("cross-entropy, nats (dotted: log K)")
    line(axes[1], "teacher_entropy", "teacher", "tab:red")
    line(axes[1], "student_entropy", "student", "tab:purple")
    axes[1].axhline(math.log(prototypes[0]), color="black", ls=":", lw=1)
    axes[1].set_title("entropy, nats (dotted: log K, a collapse)")
    line(axes[2], "feature_rank", "effective rank", "tab:brown")
    line(axes[2], "prototypes_used", "prototypes used", "tab:olive")
    twin = axes[2].twinx()
    line(twin, "mean_cosine", "mean cosine (right)", "tab:cyan")
    twin.set_ylim(-0.1, 1)
    axes[2].set_title("class tokens (cosine near 1: a collapse)")
    for axis in axes:
        axis.set_xlabel("iteration")
        lines = [*axis.get_lines(), *(twin.get_lines() if axis is axes[2] else [])]
        named = [item for item in lines if not item.get_label().startswith("_")]
        axis.legend(handles=named, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(named), frameon=False)
    figure.savefig(path, dpi=110)


def pca_colours(features: Tensor, mask: Tensor) -> Tensor:
    """The first three principal components of the masked features, stretched to [0, 1] each.

    Args:
        features: [h, w, d, E].
        mask: [h, w, d] bool; the components are those of its cells, outside is black.

    Returns:
        [h, w, d, 3].
    """
    cells = features[mask].double()
    centred = cells - cells.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    scores = centred @ vectors[:, -3:].flip(1)
    low, high = (torch.quantile(scores[:: max(1, len(scores) // 100_000)], q, dim=0) for q in (0.02, 0.98))
    out = torch.zeros(*mask.shape, 3, dtype=torch.float64)
    out[mask] = ((scores - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
    return out.float()


def draw_pca(volume: Tensor, maps: dict[str, Tensor], step: int, path: Path) -> None:
    """Three mid-slices of a volume, and beneath them its patches coloured by each network's features.

    Args:
        volume: [H, W, D] in [-1, 1].
        maps: Colours [h, w, d, 3] by name; a cell covers `step` voxels.
    """
    rows = {"volume": volume, **maps}
    figure = Figure(figsize=(9, 2.9 * len(rows)), layout="constrained", facecolor="black")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for row, (name, image) in zip(axes, rows.items(), strict=True):
        for axis_index, axis in enumerate(row):
            middle = volume.shape[axis_index] // 2
            at = middle if name == "volume" else min(middle // step, image.shape[axis_index] - 1)
            plane = np.rot90(image.select(axis_index, at).numpy())
            shown = [n for i, n in enumerate(volume.shape) if i != axis_index]
            scale = 1 if name == "volume" else step
            axis.imshow(plane, cmap="gray", vmin=-1, vmax=1, extent=(0, plane.shape[1] * scale, 0, plane.shape[0] * scale))
            axis.set(xlim=(0, shown[0]), ylim=(0, shown[1]), xticks=[], yticks=[])
            axis.set_facecolor("black")
        row[0].set_ylabel(name, color="white", fontsize=12)
    figure.savefig(path, dpi=100, facecolor="black")


def draw_readout(scores: dict[int, dict[str, list[float]]], path: Path) -> None:
    """Agreement by features, for each number of labelled volumes; a dot per held-out volume (and seed)."""
    figure = Figure(figsize=(3.9 * len(scores) + 1, 3.4), layout="constrained")
    axes = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for axis, (count, by_name) in zip(axes, scores.items(), strict=True):
        for x, (name, values) in enumerate(by_name.items()):
            axis.bar(x, np.mean(values), color=COLOURS[name], alpha=0.8)
            axis.plot(x + np.linspace(-0.2, 0.2, len(values)), values, "k.", ms=3, alpha=0.6)
            axis.text(x, 0.01, f"{np.mean(values):.2f}", ha="center", color="white", weight="bold")
        axis.set_xticks(range(len(by_name)), list(by_name))
        axis.set_title(f"{count} labelled volume{'s' * (count > 1)}")
    axes[0].set_ylabel("correlation with the true tissue shares")
    figure.savefig(path, dpi=110)
