"""The page of a pretraining: curves, what was seen and for how long, online evaluation, warnings, configuration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from dinov2.data.datalist import Datalist, read_datalist
from dinov2.errors import BadInput
from dinov2.files import is_number
from dinov2.logging.metrics import METRICS_FILE
from dinov2.report.panels import add_panel, curve, metric_chapters
from dinov2.report.record import (
    RUN_FILE,
    Log,
    config_chapter,
    device_hours,
    environment_chapter,
    ranks_of,
    read_config,
    read_log,
    read_object,
    read_rows,
    shown,
    some,
)
from dinov2.visual.figure_page import Chapter, Table, figure_page
from dinov2.visual.figures.curves import CurvePanel

EVALUATIONS, WARNINGS = "evaluation_metrics.json", "warnings.json"  # of a run that evaluates, and watches, as it goes
OBJECTIVES = {"3dino": "3DINO", "swin": "MONAI-ViT's (rotation, contrast, reconstruction)"}
CHANCE = {"rotations told, share": {"chance": 0.25}}
_LICENCE_KEYS = ("licence", "license")


def pretraining_page(folder: Path, scan: Path | None, has_examples: bool) -> str:
    """The page of a pretraining's folder.

    Args:
        folder: `train.output_dir`.
        scan: Shown through the checkpoints; None: a volume of the list.
        has_examples: Draw what needs the data and the network: crops, masks, PCA.

    Raises:
        BadInput: No step has been logged, or one of its files cannot be used.
    """
    metrics = read_rows(folder)
    if not metrics.values:
        raise BadInput(f"{folder}: its {METRICS_FILE} has no whole line: nothing has been logged yet: let the run go on")
    rows, log, config, run = metrics.values, read_log(folder), read_config(folder), read_object(folder / RUN_FILE)
    cfg = config.cfg
    datalist, list_lines = open_list(cfg, run)
    examples = example_chapters(folder, cfg, datalist, scan, rows[-1]) if has_examples and cfg is not None else []
    chapters = [*metric_chapters(rows, log.resumes, CHANCE | _prototype_levels(cfg)), *examples]
    chapters += online_chapters(folder, log.resumes)
    data = Chapter("Data", lines=[*list_lines, *licence_lines(datalist)])
    if datalist is not None:
        data.tables.extend(list_tables(datalist))
    chapters += [course_chapter(rows, log, metrics.is_cut), data, config_chapter(config), environment_chapter(run)]
    title = f"Pretraining {folder.resolve().name}"
    return figure_page(title, lead_lines(folder, cfg), chapters, tiles(rows, log, cfg), warning_lines(folder, rows))


def example_chapters(
    folder: Path, cfg: DictConfig, datalist: Datalist | None, scan: Path | None, row: Mapping[str, Any]
) -> list[Chapter]:
    """Features of one volume through the checkpoints; crops and masks."""
    from dinov2.report.checkpoints import checkpoint_chapter  # here: torch
    from dinov2.report.examples import example_chapter

    of_row = row.get("effective_batch")
    effective_batch = cfg.train.batch_size_per_gpu * cfg.train.accumulation_steps if of_row is None else int(of_row)
    return [checkpoint_chapter(folder, datalist, scan), example_chapter(cfg, datalist, effective_batch)]


def lead_lines(folder: Path, cfg: DictConfig | None) -> list[str]:
    """What the page is of."""
    lines = [f"Folder {folder.resolve()}."]
    if cfg is not None:
        objective = OBJECTIVES.get(cfg.train.objective, cfg.train.objective)
        crops = f"global crops of {cfg.crops.global_crops_size}"
        if cfg.train.objective == "3dino":
            crops += f", {cfg.crops.local_crops_number} local ones of {cfg.crops.local_crops_size} voxels"
        lines.append(f"Objective {objective}; network {cfg.student.arch}, patches of {cfg.student.patch_size}; {crops}.")
    return lines


def tiles(rows: Sequence[Mapping[str, Any]], log: Log, cfg: DictConfig | None) -> list[tuple[str, str]]:
    """The numbers that are seen first."""
    last = rows[-1]
    done = int(last["iteration"]) + 1
    planned = cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH if cfg is not None else None
    found = [(f"{done:,}", f"iterations of {planned:,}" if planned else "iterations")]
    if is_number(last.get("effective_batch")):
        batch = int(last["effective_batch"])
        found.append((f"{done * batch:,}", f"volumes seen, {batch:,} a step"))
    loss = last.get("total_loss")
    found.append((shown(loss, 4) if is_number(loss) else "not finite", "total loss, last"))
    found.append((hours(device_hours(rows, log.starts)), f"device-hours, {ranks_of(last)} rank{'s' * (ranks_of(last) > 1)}"))
    speeds = [row["volumes_per_s"] for row in rows if is_number(row.get("volumes_per_s"))]
    waits = [row["data_wait"] for row in rows if is_number(row.get("data_wait"))]
    if speeds:
        found.append((shown(float(np.median(speeds)), 3), "volumes per second, median"))
    if waits:
        found.append((f"{np.median(waits):.0%}", "of the time waits for data, median"))
    return [*found, (str(last.get("skipped_steps", len(log.skipped))), "steps skipped")]


def hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def _prototype_levels(cfg: DictConfig | None) -> dict[str, dict[str, float]]:
    """Logarithms of the numbers of prototypes: what entropies come to in a collapse to uniform."""
    if cfg is None:
        return {}
    dino, ibot = cfg.dino.head_n_prototypes, cfg.ibot.head_n_prototypes
    both = {f"log {dino:,}": math.log(dino), f"log {ibot:,}": math.log(ibot)}
    return {"cross-entropy, nats": both, "entropy of prototypes, nats": {f"log {dino:,}": math.log(dino)}}


def warning_lines(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not to be missed: warnings that the run wrote, and numbers that are not finite.

    Raises:
        BadInput: The file of warnings is damaged.
    """
    warnings = [
        f"Iteration {int(row['iteration']):,}: {row.get('message') or row.get('name') or 'a warning'}"
        for row in read_rows(folder, WARNINGS).values
    ]
    lost = [int(row["iteration"]) for row in rows if "total_loss" in row and not is_number(row["total_loss"])]
    if lost:
        warnings.append(f"The loss is not finite in {len(lost):,} of {len(rows):,} logged iterations, first in {lost[0]:,}.")
    return some(warnings)


def online_chapters(folder: Path, resumes: Sequence[int]) -> list[Chapter]:
    """Evaluation that went along with the training, where it did.

    Raises:
        BadInput: Its file is damaged.
    """
    rows = read_rows(folder, EVALUATIONS).values
    names = dict.fromkeys(name for row in rows for name in row if name != "iteration")
    if not names:
        return []
    chapter = Chapter("Online evaluation", is_grid=True)
    for name in names:
        add_panel(chapter, CurvePanel(name.replace("/", ": ", 1), {name: curve(rows, name)}, starts=resumes))
    return [chapter]


def course_chapter(rows: Sequence[Mapping[str, Any]], log: Log, is_cut: bool) -> Chapter:
    """Starts, stops, skipped steps, volumes that could not be used."""
    chapter = Chapter("Course")
    words = {i: f"asked to stop after iteration {i:,} ({why})" for i, why in log.stops}
    stories = [f"went on at iteration {start:,}: {words.get(start - 1, 'its process had ended')}" for start in log.resumes]
    if stories:
        times = "once" if len(stories) == 1 else f"{len(stories)} times"
        chapter.lines.append(f"Resumed {times} (upright lines in the curves): {'; '.join(some(stories))}.")
    else:
        chapter.lines.append("One process from its beginning, as far as the log tells.")
    last = int(rows[-1]["iteration"])
    if log.stops and log.stops[-1][0] >= last and (not log.starts or log.starts[-1] <= log.stops[-1][0]):
        chapter.lines.append(f"Stopped after iteration {log.stops[-1][0]:,} on {log.stops[-1][1]}; it has not gone on since.")
    if is_cut:
        chapter.lines.append(f"The last line of {METRICS_FILE} was cut, by a kill or because it is being written: left out.")
    skipped = rows[-1].get("skipped_steps", len(log.skipped))
    chapter.lines.append(f"Steps skipped because the loss or a gradient was not finite: {skipped}.")
    if log.skipped:
        lines = [f"{iteration:,}{': ' + what if what else ''}" for iteration, what in log.skipped]
        chapter.lines.append(f"At iterations {'; '.join(some(lines))}.")
    if log.unusable:
        chapter.lines.append(
            f"{len(log.unusable):,} messages of volumes that could not be used: {'; '.join(some(log.unusable))}."
        )
    chapter.lines.append(
        "Device-hours: seconds of the steps times ranks, as logged; start-up, checkpoints between logged steps that a process "
        "did not live to log, and work lost to a kill are not in them."
    )
    return chapter


def open_list(cfg: DictConfig | None, run: Mapping[str, Any]) -> tuple[Datalist | None, list[str]]:
    """The run's datalist where it is still there and the same, and what is to be said of it."""
    if cfg is None:
        return None, []
    try:
        datalist = read_datalist(cfg.train.dataset_path)
        kept = datalist.larger_than(cfg.train.data_min_axis_size)
    except BadInput as err:
        return None, [f"The datalist cannot be read from here: {err}."]
    lines = [f"{datalist.path}: {len(datalist):,} volumes, {len(kept):,} of them large enough."]
    before = run.get("datalist_sha256")
    if before and before != datalist.sha256:
        return None, [f"{datalist.path} is another list now than when the run was started: nothing is drawn from it."]
    return kept, lines


def licence_lines(datalist: Datalist | None) -> list[str]:
    """Licences of the data, as far as the list's entries name them."""
    if datalist is None:
        return ["Licence of the data: not known without the list."]
    named: dict[str, Counter[str]] = {}
    for entry in datalist.entries:
        licence = next((str(entry.extra[key]) for key in _LICENCE_KEYS if entry.extra.get(key)), "")
        named.setdefault(licence, Counter())[str(entry.extra.get("dataset", "no data set named"))] += 1
    if set(named) == {""}:
        return ["Licence of the data: the list does not say (its entries have no licence)."]
    parts = []
    for licence, of in named.items():
        parts.append(f"{licence or 'not said'}: {', '.join(f'{name} ({n:,})' for name, n in of.most_common())}")
    return [f"Licence of the data, as the list says: {'; '.join(parts)}."]


def list_tables(datalist: Datalist) -> list[Table]:
    """Volumes by data set, modality and organ, where the list has them."""
    counts = Counter(
        tuple(str(entry.extra.get(key, "not said")) for key in ("dataset", "modality", "organ")) for entry in datalist.entries
    )
    if set(counts) == {("not said",) * 3}:
        return []
    rows = [(*key, f"{n:,}") for key, n in counts.most_common(20)]
    more = f"The {len(rows)} most frequent of {len(counts)}." if len(counts) > len(rows) else ""
    return [Table(("data set", "modality", "organ", "volumes"), rows, more)]
