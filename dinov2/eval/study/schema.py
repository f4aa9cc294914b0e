"""A study: one YAML file that says which methods are compared on which labelled sets, fractions and seeds, and for how long.

Levels of a budget, the later ones first: of a method on a data set, of the method, of the data set, of the study; what none of
them says is the program's own default.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2.configs.errors import ConfigError, nearest
from dinov2.configs.loader import load_typed, recipe_folders
from dinov2.configs.schema import key, require, require_choice, section
from dinov2.data.downstream.lists import percentage
from dinov2.files import user_path

FOLDER = "eval/studies"
PAPERS = ("", "segmentation", "classification", "linear_decoder", "ood")
_NAME = re.compile(r"[^\s/\\.,][^\s/\\,]*")  # a folder's, and a word of a table
OF_A_CELL = ("output-dir", "dataset-name", "base-data-dir", "dataset-percent", "dataset-seed", "num-seeds", "no-resume")


@dataclass(frozen=True)
class Budget:
    """How long, with how much at a time; null: as the level above says."""

    epochs: int | None = key(None, "epochs of epoch_length iterations")
    epoch_length: int | None = key(None, "iterations of an epoch")
    warmup_iters: int | None = key(None, "iterations of the linear warm-up (segmentation)")
    eval_iters: int | None = key(None, "iterations between two validations")
    batch_size: int | None = key(
        None, "cases a step; of a segmentation each gives its recipe's crops_per_volume, so that 2 are the paper's 8 crops"
    )
    image_size: int | None = key(None, "edge of the network's input (voxels)")
    learning_rate: float | None = key(None, "peak learning rate (segmentation)")
    flags: dict[str, Any] = key({}, "further flags of the program, without dashes; true: no value; a list: several words")
    seconds_per_iteration: float | None = key(None, "as you measured it, for the hours of `study plan`")
    memory_gib: float | None = key(None, "of a device, as you measured it, for `study plan`")
    disk_gib: float | None = key(None, "that a cell leaves, as you measured it, for `study plan`")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, (int, float)) and f.name != "warmup_iters":
                require(value > 0, f"{f.name}={value} must be above 0")
        require(self.warmup_iters is None or self.warmup_iters >= 0, f"warmup_iters={self.warmup_iters} must not be negative")
        for name, value in self.flags.items():
            require(name.replace("_", "-") not in OF_A_CELL, f"flags.{name}: each cell has its own: leave it out")
            words = value if isinstance(value, list) else [value]
            is_plain = all(word is None or isinstance(word, (str, int, float)) for word in words)
            require(is_plain, f"flags.{name}={value} must be a word, a number, true, or a list of words")

    def over(self, lower: Budget) -> Budget:
        """This one, with what it leaves open filled in by a lower level."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "flags"}
        kept = {name: getattr(lower, name) if value is None else value for name, value in given.items()}
        return Budget(**kept, flags={**lower.flags, **self.flags})


@dataclass(frozen=True)
class Dataset:
    """A labelled set of a study."""

    recipe: str = key("", "a name of configs/eval/datasets, or a YAML file; default: the data set's key", is_path=True)
    base_data_dir: str = key("", "folder of its list; default: the study's", is_path=True)
    percents: list[float] = key([100], "shares of the training part, each a run of every method")
    seeds: list[int] = key([], "default: the study's")
    budget: Budget = section(Budget, "what differs from the study's")

    def __post_init__(self) -> None:
        p = self.shares
        require(len(p) > 0 and len(set(p)) == len(p), f"percents={p} must be one or more, each once")
        require(min(p) > 0 and max(p) <= 100, f"percents={p} must be above 0 and at most 100")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds={self.seeds} must be some, each once")

    @property
    def shares(self) -> list[float]:
        """Its percents, whole ones as ints, as folders and tables name them."""
        return [percentage(p) for p in self.percents]


@dataclass(frozen=True)
class Method:
    """A method of a study."""

    model: str = key("", "its name for --model-name, or module:function; default: the method's key")
    weights: str = key("", "as --pretrained-weights; default: random, where the method begins from nothing", is_path=True)
    head: str = key("", "--segmentation-head; default: the program's, or the method's own")
    datasets: list[str] = key([], "data sets that it is run on; default: all")
    budget: Budget = section(Budget, "what differs from the data set's and the study's")
    by_dataset: dict[str, Budget | None] = key({}, "what differs on a data set, by its name")


@dataclass(frozen=True)
class Study:
    """Method x data set x percent x seed; made by `load_study`."""

    name: str = key("", "of the study, in its tables; default: the file's")
    output_dir: str = key("", "folder of its cells and tables; default: studies/NAME", is_path=True)
    base_data_dir: str = key("", "folder of <dataset>_100_datalist.json or <dataset>_cls_datalist.json", is_path=True)
    cache_dir: str = key("", "folder of prepared cases, shared by all cells; default: cache, below output_dir", is_path=True)
    num_workers: int | None = key(None, "loader processes of a cell; null: the program's default")
    seeds: list[int] = key([0], "of what is drawn, each a run of every method")
    datasets: dict[str, Dataset | None] = key({}, "labelled sets by their names")
    methods: dict[str, Method | None] = key({}, "what is compared, by name")
    budget: Budget = section(Budget, "of every cell")
    subject: str = key("", "method whose gains are reported; default: the first")
    baseline: str = key("Random", "method that its gains are counted against, beside the next best")
    paper: str = key("", "comparison of the paper that the report has beside it: segmentation, classification, ...; '': none")

    def __post_init__(self) -> None:
        require(len(self.datasets) > 0, "datasets is empty: name one, as `datasets: {BTCV: {percents: [25, 100]}}`")
        require(len(self.methods) > 0, "methods is empty: name one, as `methods: {3DINO: {weights: teacher_checkpoint.pth}}`")
        for kind, names in (("datasets", self.datasets), ("methods", self.methods)):
            bad = [name for name in names if not _NAME.fullmatch(name)]
            require(not bad, f"{kind}: {bad and bad[0]!r} is no name of a folder: no spaces, slashes, commas, or dot in front")
        for name in self.methods:
            method = self.method(name)
            for dataset in (*method.datasets, *method.by_dataset):
                hint = nearest(dataset, self.datasets)
                require(dataset in self.datasets, f"methods.{name}: {dataset!r} is none of the study's data sets{hint}")
        require(len(self.seeds) > 0 and len(set(self.seeds)) == len(self.seeds), f"seeds={self.seeds} must be some, each once")
        require(not self.subject or self.subject in self.methods, f"subject={self.subject!r} is none of its methods")
        require_choice("paper", self.paper, PAPERS)

    @property
    def output(self) -> Path:
        """Its folder."""
        return Path(self.output_dir or Path("studies") / self.name)

    @property
    def cells(self) -> Path:
        """The folder of its cells."""
        return self.output / "cells"

    @property
    def first_method(self) -> str:
        """The method whose gains are reported."""
        return self.subject or next(iter(self.methods))

    def dataset(self, name: str) -> Dataset:
        """A data set of the study; one that is given as null has all defaults."""
        return self.datasets[name] or Dataset()

    def method(self, name: str) -> Method:
        """A method of the study; one that is given as null has all defaults."""
        return self.methods[name] or Method()

    def seeds_of(self, dataset: str) -> list[int]:
        """The seeds of a data set's runs."""
        return self.dataset(dataset).seeds or self.seeds

    def budget_of(self, method: str, dataset: str) -> Budget:
        """The budget of a cell, all levels in one."""
        of_method = self.method(method)
        on_it = of_method.by_dataset.get(dataset) or Budget()
        return on_it.over(of_method.budget).over(self.dataset(dataset).budget).over(self.budget)


def load_study(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """A study, from a YAML file or by its name in `configs/eval/studies`, in this order.

    A file may begin from another one by ``base: eval/studies/NAME``.

    Args:
        name_or_path: The file or name.
        overrides: ``key=value`` words, applied last.

    Raises:
        ConfigError: No such file or name, an unknown key, or a value that cannot be used; one line.
    """
    path = Path(user_path(name_or_path))
    if not path.is_file():
        known = {p.stem: p for folder in recipe_folders() for p in sorted((folder / FOLDER).glob("*.yaml"))}
        name = str(name_or_path).removeprefix("configs/").removeprefix(f"{FOLDER}/").removesuffix(".yaml")
        if name not in known:
            hint = nearest(name, known) or f" (known: {', '.join(known)})"
            raise ConfigError(f"{name_or_path}: no such study file, and no study of that name{hint}")
        path = known[name]
    study: Study = load_typed(Study, path, overrides)
    return study if study.name else dataclasses.replace(study, name=path.stem)
