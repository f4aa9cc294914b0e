"""Panels of predictions beside the truth (the paper's Fig. 3, 4 and 6), of a study whose segmentations have run.

A cell keeps its best network, no label maps: the few cases that are drawn are predicted again, as its test did. The cases are
chosen by the subject's own Dice, so that nobody has to: its best, the one in the middle and its worst.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinov2.data.downstream.cases import Case, prepare_case
from dinov2.data.downstream.lists import Item
from dinov2.errors import BadInput
from dinov2.eval.study.cells import Cell, LabelledSet, cells_of, labelled_sets
from dinov2.eval.study.figures import Drawn
from dinov2.eval.study.schema import Study
from dinov2.eval.study.table import MEAN, read_table

logger = logging.getLogger("dinov2.eval.study")

BEST = "best_model.pth"
Masks = dict[str, np.ndarray]  # [H, W, D] bool by class, without the background
Predict = Callable[[Cell, Sequence[Case]], list[Masks]]


@dataclass(frozen=True)
class Scores:
    """Dice of the test cases of a data set.

    Attributes:
        rows: Of the table of items.
        seed: Whose cells are shown.
    """

    rows: Sequence[dict[str, Any]]
    seed: int

    def of(self, method: str, percent: float, name: str) -> dict[str, float]:
        """By case, of a class or their mean; cases that count."""
        wanted = (method, percent, self.seed, name)
        found = (r for r in self.rows if (r["method"], r["percent"], r["seed"], r["class"]) == wanted)
        return {r["case"]: r["value"] for r in found if r["value"] is not None}


def draw_predictions(study: Study, drawn: Drawn, predict: Predict | None = None) -> None:
    """Panels of every segmentation whose cases are on this machine, into the chapters of the page.

    Args:
        study: It has been collected.
        drawn: What was drawn of it.
        predict: Masks of cases by a cell's network.

    Raises:
        BadInput: There are no tables, or cases or networks that cannot be read.
    """
    sets = labelled_sets(study)
    cells = cells_of(study, sets)
    items = [r for r in read_table(study, "items") if r["metric"] == "dice"]
    for chapter in list(drawn.chapters):
        labelled = sets.get(chapter.title)
        if labelled is None or labelled.recipe.task != "segmentation":
            continue
        if labelled.problem:
            logger.warning("no panels: %s", labelled.problem)
            continue
        rows = [r for r in items if r["dataset"] == labelled.name]
        own = [c for c in cells if c.dataset == labelled.name and c.seed == study.seeds[0]]
        _panels(study, labelled, own, Scores(rows, study.seeds[0]), drawn, chapter, predict or by_best_network)


def _panels(
    study: Study, labelled: LabelledSet, cells: Sequence[Cell], scores: Scores, drawn: Drawn, chapter: Any, predict: Predict
) -> None:
    """Two figures of a data set: cases, and the classes of one apart."""
    from dinov2.visual.figures.planes import draw_planes

    ran = sorted({r["percent"] for r in scores.rows})
    percents = list(dict.fromkeys([*ran[-3:][:1], *ran[-1:]]))
    subject = next((m for m in (study.first_method, *study.methods) if scores.of(m, percents[0], MEAN)), None)
    if subject is None:
        return
    chosen = _spread(scores.of(subject, percents[0], MEAN))
    by_name = {item.case: item for item in labelled.splits["test"]}
    cases = {name: prepare_case(_item(by_name, name, labelled), labelled.recipe) for name in chosen}
    predicted: dict[tuple[str, float], dict[str, Masks]] = {}
    for cell in cells:
        if cell.percent not in percents or not (cell.folder / BEST).is_file():
            continue
        if cell.settings.get("resize-scale", 1) != 1:
            logger.warning("%s: not in the panels: it ran with a resize-scale, on another grid", cell.name)
        else:
            predicted[cell.method, cell.percent] = dict(zip(cases, predict(cell, list(cases.values())), strict=True))
    methods = [m for m in study.methods if any((m, p) in predicted for p in percents)]
    if not methods:
        logger.warning("%s: no panels: none of its cells of seed %d has a %s", labelled.name, scores.seed, BEST)
        return
    names = _foreground(labelled)
    view = _View(cases, predicted, scores, methods, names, labelled)
    stem = f"panels_{labelled.name}"
    rows = [
        view.row(name, percent, f"{name} ({why})\n{percent} %", names) for name, why in chosen.items() for percent in percents
    ]
    draw_planes(rows, methods, names, drawn.folder / stem)
    fractions = " and ".join(f"{p} %" for p in percents)
    words = f"{subject}'s best, middle and worst test case at {percents[0]} %, seed {scores.seed}"
    _add(
        drawn, chapter, stem, f"{labelled.name}: predictions at {fractions} of the labels ({words}); above: Dice of the volume."
    )
    if len(names) > 1:
        middle = next((name for name, why in chosen.items() if why == "middle"), next(iter(chosen)))
        apart = [view.row(middle, percents[0], name, [name]) for name in names]
        stem = f"panels_classes_{labelled.name}"
        draw_planes(apart, methods, names, drawn.folder / stem)
        _add(
            drawn,
            chapter,
            stem,
            f"{labelled.name}: the classes of {middle} apart, at {percents[0]} %; above: Dice of the class.",
        )


def _add(drawn: Drawn, chapter: Any, stem: str, caption: str) -> None:
    from dinov2.visual.figure_page import Picture

    chapter.pictures.append(Picture(drawn.folder / f"{stem}.png", caption))


def _item(by_name: dict[str, Item], name: str, labelled: LabelledSet) -> Item:
    if name not in by_name:
        raise BadInput(f"{labelled.name}: its list has no test case {name}, which the tables have: collect again")
    return by_name[name]


def _foreground(labelled: LabelledSet) -> list[str]:
    return labelled.recipe.output_names[0 if labelled.recipe.overlapping else 1 :]


def _spread(scores: dict[str, float]) -> dict[str, str]:
    """Cases by what they stand for."""
    ordered = sorted((case for case in scores if math.isfinite(scores[case])), key=lambda case: (-scores[case], case))
    if len(ordered) < 3:
        return dict(zip(ordered, ("best", "worst"), strict=False))
    return {ordered[0]: "best", ordered[(len(ordered) - 1) // 2]: "middle", ordered[-1]: "worst"}


@dataclass(frozen=True)
class _View:
    """What rows are made from."""

    cases: dict[str, Case]
    predicted: dict[tuple[str, float], dict[str, Masks]]
    scores: Scores
    methods: list[str]
    names: list[str]
    labelled: LabelledSet

    def row(self, name: str, percent: float, label: str, classes: Sequence[str]) -> Any:
        """A case at a fraction, of some classes."""
        from dinov2.visual.figures.planes import TRUTH, Shown

        case = self.cases[name]
        of_column = {TRUTH: masks_of(case.truth, self.labelled)}
        of_column |= {m: self.predicted[m, percent][name] for m in self.methods if (m, percent) in self.predicted}
        one = MEAN if len(classes) > 1 or self.names == list(classes) else classes[0]
        scores = {m: self.scores.of(m, percent, one).get(name, math.nan) for m in self.methods}
        masks = {column: {c: of[c] for c in classes} for column, of in of_column.items()}
        return Shown(label, case.image[0].numpy(), case.spacing_mm, masks, scores)


def masks_of(label: Any, labelled: LabelledSet) -> Masks:
    """[1, H, W, D] label map as masks by class, without the background."""
    masks = labelled.recipe.masks(label)
    return {n: m.numpy() for n, m in zip(labelled.recipe.output_names, masks, strict=True) if n in _foreground(labelled)}


def by_best_network(cell: Cell, cases: Sequence[Case]) -> list[Masks]:
    """Masks of prepared cases by the network that a cell kept, as its test made them."""
    from dinov2.distributed.precision import evaluation_dtype
    from dinov2.distributed.runtime import start_runtime
    from dinov2.eval.segmentation_3d.build import load_segmentation
    from dinov2.eval.segmentation_3d.inference import TEST_OVERLAP, predict_masks

    runtime = start_runtime()
    model, cfg, task = load_segmentation(cell.folder / BEST, runtime, str(cell.settings["model-name"]))
    dtype = evaluation_dtype(cfg, runtime.device.type)
    first = 0 if task.recipe.overlapping else 1
    found = []
    for case in cases:
        masks = predict_masks(model, case, task.recipe, task.image_size, TEST_OVERLAP, cfg.segmentation.window_batch, dtype)
        found.append({n: m.numpy() for n, m in zip(task.recipe.output_names[first:], masks[first:], strict=True)})
    return found
