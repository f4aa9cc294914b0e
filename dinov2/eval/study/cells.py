"""The cells of a study: one run of a program each, with its flags, its cases and its folder.

`method_settings` is the one place that knows how a method is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dinov2.configs.schema import ARCH_NAMES
from dinov2.data.downstream.lists import SPLITS, Item, read_downstream_datalist, select_percent, with_tertiles
from dinov2.data.downstream.recipes import Recipe, load_recipe
from dinov2.errors import BadInput
from dinov2.eval.methods import registry as methods
from dinov2.eval.methods.registry import EDGE
from dinov2.eval.study.schema import Method, Study
from dinov2.files import to_json, user_path

LENGTHS = {"segmentation": (100, 300), "classification": (100, 125)}  # the programs' own epochs, and iterations of each
PROBED = 32  # cases a step of a classification
COMMANDS = {"segmentation": "segment", "classification": "linear"}  # of `dinov2`, by a recipe's task
RANDOM = "random"
NAMED_WEIGHTS = (RANDOM, "demo", *ARCH_NAMES)  # words for weights that are no files
FROM_NOTHING = ("Random", "SwinRandom", "UNet")  # methods that begin from no weights
NOT_DECISIVE = ("output-dir", "base-data-dir", "cache-dir", "num-workers")  # flags that may differ when a cell is continued
_BUDGET_FLAGS = {  # keys of a budget as each program spells them
    "segmentation": {
        "epochs": "epochs", "epoch_length": "epoch-length", "warmup_iters": "warmup-iters", "eval_iters": "eval-iters",
        "batch_size": "batch-size", "image_size": "image-size", "learning_rate": "learning-rate",
    },
    "classification": {
        "epochs": "epochs", "epoch_length": "epoch-length", "eval_iters": "eval-period-iterations",
        "batch_size": "batch-size", "image_size": "image-size",
    },
}  # fmt: skip
Settings = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """The cases of one part of a cell."""

    count: int
    sha: str  # of their names, files and labels, in order

    @classmethod
    def of(cls, items: Sequence[Item], folder: Path) -> Part:
        """Of some items; their files are named as seen from the list's folder, so that data may move."""
        rows = [[i.case, i.patient, _seen_from(folder, i.label), *(_seen_from(folder, p) for p in i.images)] for i in items]
        return cls(len(items), hashlib.sha256(to_json(rows).encode()).hexdigest())


def _seen_from(folder: Path, value: str | float | None) -> str | float | None:
    return os.path.relpath(value, folder) if isinstance(value, str) else value


@dataclass(frozen=True)
class LabelledSet:
    """A data set of a study on this machine.

    Attributes:
        name: In the study.
        recipe: Its recipe.
        base_data_dir: Folder of its list.
        problem: Why its list cannot be used; empty where it can.
        splits: Items of each part; none where there is a problem.
    """

    name: str
    recipe: Recipe
    base_data_dir: str
    problem: str
    splits: dict[str, list[Item]]

    @cached_property
    def folder(self) -> Path:
        return Path(os.path.abspath(self.base_data_dir))

    def parts(self, percent: float, seed: int) -> dict[str, Part]:
        """The cases of a cell as its program takes them: of a segmentation the first ones, else a seed's own."""
        if not self.splits:
            return {}
        drawn_by = None if self.recipe.task == "segmentation" else seed
        chosen = {**self.splits, "training": select_percent(self.splits["training"], percent, drawn_by)}
        return {name: Part.of(chosen[name], self.folder) for name in SPLITS}


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        settings: The program's flags, by name, without dashes.
        parts: Its cases by part; none where the list cannot be read.
        recipe: A hash of what the data set's recipe says.
        channels: Of a scan.
    """

    dataset: str
    method: str
    percent: float
    seed: int
    task: str
    folder: Path
    settings: Settings
    parts: dict[str, Part]
    recipe: str
    channels: int = 1

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.method}/{self.percent}/{self.seed}"

    def command(self) -> list[str]:
        """The words of `dinov2`."""
        return [COMMANDS[self.task], *(word for name, value in self.settings.items() for word in _flag(name, value))]

    @property
    def iterations(self) -> int:
        """Of its training."""
        epochs, length = LENGTHS[self.task]
        return self._number("epochs", epochs) * self._number("epoch-length", length)

    @property
    def batch(self) -> int:
        """Cases a step: its own, or its method's."""
        if self.task == "classification":
            return self._number("batch-size", PROBED)
        head = self.settings.get("segmentation-head") or self._method.heads[0]
        return self._number("batch-size", self._method.cases_a_step(head, self.channels))

    @property
    def edge(self) -> int:
        """Of the network's input (voxels): its own, or its method's; of one that is planned from the list, about that."""
        return self._number("image-size", self._method.image_size or EDGE)

    @property
    def misfit(self) -> str:
        """Why its method cannot be run so; empty where it can, as far as a plan knows."""
        return self._method.misfit(self.task, self.settings.get("segmentation-head"), self.settings.get("image-size"))

    @property
    def _method(self) -> methods.Method:
        return methods.find_method(str(self.settings["model-name"]))

    def _number(self, flag: str, default: int) -> int:
        value = self.settings.get(flag)
        return value if isinstance(value, int) else default

    def identity(self) -> dict[str, Any]:
        """What decides its result, as JSON types."""
        decisive = {name: value for name, value in self.settings.items() if name not in NOT_DECISIVE}
        parts = {name: dataclasses.asdict(part) for name, part in self.parts.items()}
        return {"cell": self.name, "settings": decisive, "recipe": self.recipe, "parts": parts}


def _flag(name: str, value: Any) -> list[str]:
    """A flag as words: true stands alone; false and null are left out."""
    if value is None or value is False:
        return []
    words = [] if value is True else [str(v) for v in (value if isinstance(value, list) else [value])]
    return [f"--{name}", *words]


def labelled_sets(study: Study) -> dict[str, LabelledSet]:
    """The data sets of a study; a list that is not there is a problem of its set.

    Raises:
        BadInput: A recipe that cannot be used.
    """
    return {name: _labelled_set(study, name) for name in study.datasets}


def _labelled_set(study: Study, name: str) -> LabelledSet:
    given = study.dataset(name)
    recipe = load_recipe(given.recipe or name)
    if recipe.task not in COMMANDS:
        raise BadInput(f"datasets.{name}: its recipe is for {recipe.task}: a study has {' and '.join(COMMANDS)}")
    base = user_path(given.base_data_dir or study.base_data_dir)
    if not base:
        return LabelledSet(name, recipe, base, f"{name}: no base_data_dir: say where its list is", {})
    try:
        recipe = with_tertiles(recipe, base)
        splits = read_downstream_datalist(base, recipe)
        select_percent(splits["training"], min(given.percents))  # refused here, where the data set is named
        return LabelledSet(name, recipe, base, "", splits)
    except BadInput as err:
        return LabelledSet(name, recipe, base, f"{name}: {err}", {})


def cells_of(study: Study, sets: dict[str, LabelledSet]) -> list[Cell]:
    """All cells: data sets, in each the percents, the seeds, and the methods side by side."""
    return [
        _cell(study, labelled, method, percent, seed)
        for labelled in sets.values()
        for percent in study.dataset(labelled.name).shares
        for seed in study.seeds_of(labelled.name)
        for method in study.methods
        if labelled.name in (study.method(method).datasets or study.datasets)
    ]


def _cell(study: Study, labelled: LabelledSet, method: str, percent: float, seed: int) -> Cell:
    given, task = study.dataset(labelled.name), labelled.recipe.task
    budget = study.budget_of(method, labelled.name)
    folder = study.cells / labelled.name / method / str(percent) / str(seed)
    recipe = given.recipe or labelled.name
    asked = {
        "dataset-name": os.path.abspath(user_path(recipe)) if os.path.isfile(user_path(recipe)) else recipe,
        "base-data-dir": labelled.base_data_dir,
        "output-dir": str(folder),
        "cache-dir": study.cache_dir or str(study.output / "cache"),
        "dataset-percent": percent,
        "dataset-seed": seed,
        **method_settings(method, study.method(method), task),
        **{flag: getattr(budget, name) for name, flag in _BUDGET_FLAGS[task].items()},
        "num-workers": study.num_workers,
        **{name.replace("_", "-"): value for name, value in budget.flags.items()},
    }
    settings = {name: value for name, value in asked.items() if value is not None and value is not False}
    parts = labelled.parts(percent, seed)
    says = hashlib.sha256(repr(labelled.recipe).encode()).hexdigest()
    return Cell(labelled.name, method, percent, seed, task, folder, settings, parts, says, labelled.recipe.channels)


def method_settings(name: str, method: Method, task: str) -> Settings:
    """How the programs are asked for a method; what they do not know, they refuse by name."""
    model = method.model or name
    weights = method.weights or (RANDOM if model in FROM_NOTHING else "")
    settings: Settings = {"model-name": model, "pretrained-weights": _absolute(weights)}
    return settings | ({"segmentation-head": method.head} if task == "segmentation" and method.head else {})


def _absolute(weights: str) -> str:
    """Weights of a file or folder by their absolute path, so that a cell goes on from anywhere; others as they are."""
    if not weights or weights in NAMED_WEIGHTS:
        return weights
    path = user_path(weights)
    return os.path.abspath(path) if os.path.exists(path) else weights
