"""What a study amounts to before anything runs: problems, and each cell's iterations, hours and memory.

Hours and memory are the study file's where it has them (`seconds_per_iteration`, `memory_gib`). Else they are a plain model of
what was measured once (docs/gpu.md): a step with 8 crops of 112 cubed of a ViT-L adapter on an H200, in proportion to crops and
voxels, whatever the method and its channels. Of a probe only the products of a ViT-L's forward pass are counted, at the share
of the card's rate that training reached there; its loaders take longer, so that its hours are the least.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2.data.downstream.recipes import Recipe
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK
from dinov2.eval.study.cells import NAMED_WEIGHTS, Cell, LabelledSet, cells_of, labelled_sets
from dinov2.eval.study.schema import Budget, Study
from dinov2.logging import Say

STEP_S, STEP_GIB = 1.44, 47.9  # of 8 crops of 112 cubed, as above
STEP_VOXELS = 8 * 112**3
FORWARD_FLOP = 2 * 12 * 24 * 1024**2  # a token of a ViT-L (depth 24, width 1024), its attention left out
RATE_FLOP = 0.469 * 792e12  # a second: share and rate of an H200 in bf16
PATCH = 16
KEPT_GIB = {"segmentation": 5.0, "classification": 0.1}  # at most: a ViT-L trained whole, its moments and its best weights
MARKS = {
    "~": f"not measured: from {STEP_S:g} s and {STEP_GIB:.0f} GiB of a ViT-L adapter on an H200 for 8 crops of 112 cubed "
    "(docs/gpu.md), in proportion to crops and voxels, whatever the method; give seconds_per_iteration and memory_gib",
    ">": "at least: products of a ViT-L's forward pass on an H200, without the loaders; give seconds_per_iteration",
}
_GIB = 2**30
_HUB = re.compile(r"([\w.-]+/[\w.-]+)(@[\w./-]+)?(:.+)?")
_FILES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class Estimate:
    """What a cell takes.

    Attributes:
        iterations: Of its training.
        hours: Of its training.
        memory_gib: Of a device; None where nothing is known.
        marks: Before hours and memory: nothing where they are the study file's own, ~ modelled, > at least.
        disk_gib: That it leaves.
    """

    iterations: int
    hours: float
    memory_gib: float | None
    marks: tuple[str, str]
    disk_gib: float


def plan(study: Study, say: Say) -> int:
    """Say everything; exit code 2 where something is missing."""
    sets = labelled_sets(study)
    cells = cells_of(study, sets)
    estimates = [estimate(cell, study.budget_of(cell.method, cell.dataset), sets[cell.dataset].recipe) for cell in cells]
    seeds = {cell.seed for cell in cells}
    counts = f"data sets: {len(study.datasets)}, methods: {len(study.methods)}, seeds: {len(seeds)}"
    say(f"{study.name}: {len(cells)} cells ({counts}), in {study.output}")
    rows = [_row(cell, one) for cell, one in zip(cells, estimates, strict=True)]
    for line in aligned([("cell", "training", "iterations", "hours", "GiB"), *rows]):
        say(line)
    iterations, hours = sum(one.iterations for one in estimates), about(sum(one.hours for one in estimates))
    say(f"together {iterations:,} iterations, about {hours} hours one after the other, without tests")
    for mark, meaning in MARKS.items():
        if any(mark in one.marks for one in estimates):
            say(f"{mark}: {meaning}")
    problems = problems_of(study, sets, cells) + disk_problem(study, sets, cells, estimates)
    for problem in problems:
        say(f"problem: {problem}")
    return EXIT_BAD_INPUT if problems else EXIT_OK


def estimate(cell: Cell, budget: Budget, recipe: Recipe) -> Estimate:
    """What a cell takes; see the top of this file."""
    seconds, memory = budget.seconds_per_iteration, budget.memory_gib
    marks = ["" if given else "~" for given in (seconds, memory)]
    if cell.task == "segmentation":
        share = cell.batch * recipe.train.crops_per_volume * cell.edge**3 / STEP_VOXELS
        seconds, memory = seconds or STEP_S * share, memory or STEP_GIB * share
    elif seconds is None:
        seconds, marks[0] = cell.batch * (1 + (cell.edge // PATCH) ** 3) * FORWARD_FLOP / RATE_FLOP, ">"
    hours = cell.iterations * seconds / 3600
    return Estimate(cell.iterations, hours, memory, (marks[0], marks[1]), budget.disk_gib or KEPT_GIB[cell.task])


def problems_of(study: Study, sets: dict[str, LabelledSet], cells: Sequence[Cell]) -> list[str]:
    """Lists and weights that some cells need and that are not there, and methods that cannot be run so; a line each."""
    needed = {cell.dataset for cell in cells}
    problems = [labelled.problem for name, labelled in sets.items() if name in needed and labelled.problem]
    for name in study.methods:
        of_method = next((cell.settings for cell in cells if cell.method == name), None)
        if of_method is not None:
            problem = weights_problem(str(of_method["pretrained-weights"]))
            problems += [f"methods.{name}.weights: {problem}"] if problem else []
    misfits = {(cell.method, cell.dataset): cell.misfit for cell in cells}
    return problems + [f"{method} on {dataset}: {why}" for (method, dataset), why in misfits.items() if why]


def weights_problem(weights: str) -> str:
    """Why weights cannot be found, without opening them; empty where they can, or where a hub would be asked."""
    if not weights:
        return "this method needs some: give a file, a run's folder, owner/name on the hub, or random"
    if weights in NAMED_WEIGHTS or os.path.exists(weights):
        return ""
    hub = _HUB.fullmatch(weights)
    if hub and not hub[1].endswith(_FILES) and not os.path.isdir(weights.split("/")[0]):
        return ""
    return f"{weights}: no such file or folder"


def disk_problem(study: Study, sets: dict[str, LabelledSet], cells: Sequence[Cell], estimates: Sequence[Estimate]) -> list[str]:
    """A line where the disk has less room than the cells to come may take."""
    place = next(p for p in (study.output.absolute(), *study.output.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free / _GIB
    to_come = [e.disk_gib for c, e in zip(cells, estimates, strict=True) if not (c.folder / "results.json").exists()]
    prepared = sum(_source_bytes(labelled) for labelled in sets.values()) / _GIB if to_come else 0.0
    if sum(to_come) + prepared <= free:
        return []
    most = f"at most {KEPT_GIB['segmentation']:g} each, as of a ViT-L, where disk_gib does not say"
    return [
        f"{place}: has {about(free)} GiB free, {len(to_come)} cells may leave {about(sum(to_come))} ({most}), and prepared "
        f"cases about {about(prepared)}: make room"
    ]


def _source_bytes(labelled: LabelledSet) -> int:
    """Of the files of a data set, which prepared cases are about as large as."""
    files = {
        path
        for items in labelled.splits.values()
        for item in items
        for path in (*item.images, *([item.label] if isinstance(item.label, str) else []))
    }
    return sum(Path(path).stat().st_size for path in files if os.path.isfile(path))


def _row(cell: Cell, one: Estimate) -> tuple[str, ...]:
    training = str(cell.parts["training"].count) if cell.parts else "?"
    memory = "?" if one.memory_gib is None else one.marks[1] + about(one.memory_gib)
    return (cell.name, training, f"{one.iterations:,}", one.marks[0] + about(one.hours), memory)


def about(value: float) -> str:
    """A number by its first two digits."""
    if value <= 0:
        return "0"
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
