"""Which numbers of a metrics file stand together in a panel, and under which title; what nobody names here gets a panel too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinov2.files import is_number
from dinov2.report.record import shown
from dinov2.visual.figure_page import Chapter, Picture
from dinov2.visual.figures.curves import Curve, CurvePanel, curve_png

COUNTS = ("iteration", "current_batch_size", "effective_batch", "skipped_steps")  # said in words, not drawn
OTHER = "Other numbers"


@dataclass(frozen=True)
class Panel:
    """Metrics of one axis.

    Attributes:
        chapter: Of the page.
        title: Above it.
        names: The metrics, and their names in the legend.
        is_log: The axis.
    """

    chapter: str
    title: str
    names: Mapping[str, str]
    is_log: bool = False


PANELS = (
    Panel("Losses", "total loss", {"total_loss": "total"}),
    Panel("Losses", "training loss", {"loss": "loss", "lowest_loss": "lowest of all heads"}),
    Panel("Losses", "terms of the loss", {
        "dino_local_crops_loss": "DINO, local crops", "dino_global_crops_loss": "DINO, global crops", "ibot_loss": "iBOT",
        "koleo_loss": "KoLeo", "rotation_loss": "rotation", "contrastive_loss": "contrast",
        "reconstruction_loss": "reconstruction",
    }),
    Panel("Losses", "cross-entropy, nats", {"dino_cross_entropy": "DINO (image)", "ibot_cross_entropy": "iBOT (patches)"}),
    Panel("Monitors", "entropy of prototypes, nats", {"teacher_entropy": "teacher", "student_entropy": "student"}),
    Panel("Monitors", "different prototypes used in a step", {"prototypes_used": "prototypes"}),
    Panel("Monitors", "effective rank of class tokens", {"feature_rank": "rank"}),
    Panel("Monitors", "mean cosine of class tokens (1: a collapse)", {"mean_cosine": "cosine"}),
    Panel("Monitors", "rotations told, share", {"rotation_accuracy": "told"}),
    Panel("Monitors", "gradient norms before clipping", {
        "grad_norm_backbone": "backbone", "grad_norm_dino_head": "DINO head", "grad_norm_ibot_head": "iBOT head",
        "grad_norm_swin_head": "heads",
    }, is_log=True),
    Panel("Schedules", "learning rate", {"lr": "learning rate", "last_layer_lr": "of the last layer"}),
    Panel("Schedules", "learning rate over its base", {"lr_factor": "factor"}),
    Panel("Schedules", "weight decay", {"wd": "weight decay"}),
    Panel("Schedules", "momentum of the teacher", {"mom": "momentum"}),
    Panel("Schedules", "temperature of the teacher", {"teacher_temp": "temperature"}),
    Panel("Speed", "volumes per second", {"volumes_per_s": "volumes per second"}),
    Panel("Speed", "seconds of a step", {"iter_time": "step", "data_time": "of it, waiting for data"}, is_log=True),
    Panel("Speed", "share of the time that waits for data", {"data_wait": "share"}),
    Panel("Speed", "share of the measured matrix-product rate", {"mfu": "share"}),
    Panel("Speed", "processor cores, shares", {"cpu_used": "of them used", "cpu_wait": "of the time one was waited for"}),
    Panel("Speed", "peak memory, GiB", {"memory_gib": "GiB"}),
)  # fmt: skip


def curve(rows: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """A metric of the rows that have it; null and what is no number is NaN."""
    own = [row for row in rows if name in row]
    values = [float(row[name]) if is_number(row[name]) else math.nan for row in own]
    return Curve(np.array([float(row["iteration"]) for row in own]), np.array(values))


def metric_chapters(
    rows: Sequence[Mapping[str, Any]], starts: Sequence[int] = (), levels: Mapping[str, Mapping[str, float]] | None = None
) -> list[Chapter]:
    """The curves of a metrics file.

    Args:
        rows: Its lines.
        starts: Iterations at which the run went on.
        levels: Dotted lines by their names, by the panel's title.

    Returns:
        Chapters of small pictures; a number that never changes is said in a line in its place.
    """
    known = {name for panel in PANELS for name in panel.names}
    found = dict.fromkeys(name for row in rows for name in row if name not in COUNTS)
    others = [Panel(OTHER, name, {name: name}) for name in found if name not in known]
    chapters: dict[str, Chapter] = {}
    constant: dict[str, list[str]] = {}
    for panel in (*PANELS, *others):
        curves = {label: curve(rows, name) for name, label in panel.names.items() if name in found}
        if not curves:
            continue
        chapter = chapters.setdefault(panel.chapter, Chapter(panel.chapter, is_grid=True))
        values = np.concatenate([one.values for one in curves.values()])
        if len(rows) > 1 and np.isfinite(values).all() and all(np.ptp(one.values) == 0 for one in curves.values()):
            fixed = [(label, shown(float(one.values[0]))) for label, one in curves.items()]
            words = fixed[0][1] if len(fixed) == 1 else ", ".join(f"{label} {value}" for label, value in fixed)
            constant.setdefault(panel.chapter, []).append(f"{panel.title} {words}")
            continue
        drawn = CurvePanel(panel.title, curves, (levels or {}).get(panel.title, {}), starts, panel.is_log)
        add_panel(chapter, drawn)
    for name, fixed_lines in constant.items():
        chapters[name].lines.append(f"The same in all iterations: {'; '.join(fixed_lines)}.")
    return list(chapters.values())


def add_panel(chapter: Chapter, panel: CurvePanel) -> None:
    """Draw a panel into a chapter, its last values beneath; where none is finite, a line says so."""
    png = curve_png(panel)
    gaps = {label: int((~one.is_finite).sum()) for label, one in panel.curves.items()}
    if png is None:
        count = sum(len(one.values) for one in panel.curves.values())
        chapter.lines.append(f"{panel.title}: none of {count:,} values can be drawn (not finite, or not above zero).")
        return
    last = [f"{label} {_last(one)}" if len(panel.curves) > 1 else _last(one) for label, one in panel.curves.items()]
    caption = f"Last: {', '.join(last)}."
    lost = [f"{n:,} of {len(panel.curves[label].values):,} values of {label} are not finite" for label, n in gaps.items() if n]
    if lost:
        caption += f" {'; '.join(lost)}: gaps, with a cross below."
    chapter.pictures.append(Picture(png, caption, panel.title))


def _last(one: Curve) -> str:
    return shown(float(one.values[-1]), 4) if one.is_finite[-1] else "not finite"
