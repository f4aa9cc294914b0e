"""What surrounds every evaluation: shared flags, inputs that are checked before a case is read, the folder and whose it is.

Reading order: `eval_parser` and `checked_request` (the flags) -> `open_run` -> `Setting.begin`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2.checkpointer.teacher import Teacher, open_teacher
from dinov2.configs import Config, ConfigError, default_yaml, load_and_merge_config_3d
from dinov2.configs.loader import config_keys, typed_from
from dinov2.data.corpus.overlap import warn_of_overlap
from dinov2.data.datalist import Entry
from dinov2.data.downstream.cases import Cases, check_headers
from dinov2.data.downstream.lists import (
    Item,
    datalist_path,
    percentage,
    read_downstream_datalist,
    select_percent,
    with_tertiles,
)
from dinov2.data.downstream.recipes import Recipe, load_recipe
from dinov2.data.downstream.skull import warn_of_skulls
from dinov2.distributed import barrier, gather_objects, is_main_process
from dinov2.distributed.runtime import Runtime, lost_rank_explained, start_runtime
from dinov2.errors import BadInput
from dinov2.eval.methods.flags import add_method_flags
from dinov2.eval.methods.networks import config_of, open_network, require_whole, say_what_was_used
from dinov2.eval.methods.registry import OURS, Method, find_method
from dinov2.eval.methods.unet_plan import UNetPlan
from dinov2.files import read_json, write_json, write_text
from dinov2.geometry import Edges, edges, triple
from dinov2.logging import setup_logging
from dinov2.logging.folder import run_folder, set_aside
from dinov2.logging.provenance import RUN_FILE, run_record
from dinov2.models import BackboneModule

logger = logging.getLogger(__name__)

PROGRAMS = {"segmentation": "segmentation3d.py", "classification": "linear3d.py", "regression": "regression.py"}
IDENTITY = "decisive.json"
NOT_DECISIVE = {  # flags that a resume may change
    "output_dir", "cache_dir", "num_workers", "local_rank", "base_data_dir", "no_resume",
}  # fmt: skip
MAX_WORDS = 6  # of another configuration that a refusal names
KEPT = ("checkpoint.pth", "best_model.pth", "probe.pth", "results.json")  # what a run goes on from, or came to
LEFT = (
    *KEPT, IDENTITY, "config.yaml", "predictions.csv", "per_case.csv", "worst", "validation_case.png",
    "training_metrics.json", "tensorboard", "seed_*", RUN_FILE,  # last: what is left by a kill is still known for ours
)  # fmt: skip


def eval_parser(
    program: str, description: str, datalist: str, batch_size: int | None, batch_help: str, has_methods: bool = False
) -> argparse.ArgumentParser:
    """The flags that every evaluation has; their names are the keys of `decisive.json`.

    Args:
        datalist: Kind of the data set's list, as its file is named.
        batch_size: Default; None: the method's.
        batch_help: Its unit.
        has_methods: With `--model-name`, whose method sets what is not given (`methods.flags.complete`).
    """
    parser = argparse.ArgumentParser(program, description=description)
    add = parser.add_argument
    add("--config-file", help="configuration of the backbone (a YAML file or a name), for weights that do not tell their own")
    weights = "file, checkpoint's or run's folder, owner/name on the hub, demo; untrained: random, or a network's name"
    add("--pretrained-weights", required=not has_methods, help=weights)
    add("--output-dir", required=True, help="folder of the run")
    add("--opts", nargs="*", default=[], metavar="key=value", help="configuration overrides")
    add("--dataset-name", required=True, help="a recipe: a name of configs/eval/datasets, or a YAML file")
    add("--dataset-percent", type=percentage, default=100, help="share of the training part that is used")
    add("--base-data-dir", required=True, help=f"folder of <dataset>_{datalist}_datalist.json")
    size = "; default: the method's" if has_methods else ""
    add("--image-size", type=int, default=None if has_methods else 112, help=f"edge of the network's input (voxels){size}")
    add("--batch-size", type=int, default=batch_size, help=batch_help)
    add("--num-workers", type=int, default=8, help="loader processes")
    add("--cache-dir", help="folder of prepared cases; default: cache, below --output-dir")
    add("--dataset-seed", type=int, default=0, help="of what is drawn: crops, their order, a training subset")
    add("--no-resume", action="store_true", help="start anew; an earlier run of the folder is moved aside")
    add("--local-rank", type=int, default=0, help="accepted for old launchers, no effect")
    if has_methods:
        add_method_flags(parser)
    return parser


def frozen_parser(program: str, description: str, has_methods: bool = False) -> argparse.ArgumentParser:
    """The flags that every evaluation of frozen features has."""
    return eval_parser(program, description, "cls", 32, "images of a step and process", has_methods)


@dataclass(frozen=True)
class Request:
    """What every evaluation is asked for.

    Attributes:
        weights: As of `open_teacher`.
        overrides: Of the configuration.
        image_size: Of the network's input (voxels).
        model_name: Of a method.
        unet_plan: Of a U-Net, in plain types.
        flags: All flags of the program that decide its result, by their names.
    """

    weights: str
    config_file: str | None
    overrides: tuple[str, ...]
    output_dir: str
    cache_dir: str | None
    dataset_name: str
    base_data_dir: str
    dataset_percent: float
    dataset_seed: int
    image_size: Edges
    batch_size: int
    num_workers: int
    no_resume: bool
    flags: Mapping[str, Any]
    model_name: str = OURS
    unet_plan: dict[str, Any] | None = None

    @property
    def method(self) -> Method:
        return find_method(self.model_name)

    @property
    def plan(self) -> UNetPlan | None:
        return None if self.unet_plan is None else UNetPlan.from_plain(self.unet_plan)

    @property
    def cube(self) -> int:
        """Edge of the input of a network that sees cubes: all but a planned U-Net."""
        assert isinstance(self.image_size, int)
        return self.image_size


def checked_request(args: argparse.Namespace) -> Request:
    """The shared part of a command line, of methods completed (`methods.flags.complete`).

    Raises:
        BadInput: A number that must be positive.
    """
    size: Edges = args.image_size if isinstance(args.image_size, int) else triple(args.image_size)
    require_positive(image_size=min(edges(size)), batch_size=args.batch_size)
    same = {f.name: getattr(args, f.name) for f in dataclasses.fields(Request) if hasattr(args, f.name)}
    same["image_size"] = size
    flags = {k: v for k, v in vars(args).items() if k not in NOT_DECISIVE}
    return Request(**same, weights=args.pretrained_weights, overrides=tuple(args.opts), flags=flags)


def require_positive(**flags: float | None) -> None:
    """Raise `BadInput` for the first of some flags that is given and not above zero."""
    for name, value in flags.items():
        if value is not None and not value > 0:
            raise BadInput(f"--{name.replace('_', '-')} {value} must be positive")


@dataclass(frozen=True)
class Setting:
    """What an evaluation works with.

    Attributes:
        request: The shared flags.
        cfg: The backbone's configuration.
        recipe: The dataset's; of features with all sizes and bins in numbers.
        encoder: The method's, frozen, in evaluation mode, on the device; None: it has none (UNet).
        cases: Of training, validation and test; of a segmentation's training part its share, else all.
        output_dir: Of the run, held by its lock.
        runtime: Rank and device.
        weights: A source that finds the weights later.
        decisive: What decides the result, as `decisive.json` keeps it.
    """

    request: Request
    cfg: DictConfig
    recipe: Recipe
    encoder: BackboneModule | None
    cases: dict[str, Cases]
    output_dir: Path
    runtime: Runtime
    weights: str
    decisive: dict[str, Any]

    @property
    def backbone(self) -> BackboneModule:
        """The encoder of a method that has one, as all do that classify."""
        assert self.encoder is not None
        return self.encoder

    def begin(self) -> None:
        """Take the folder for this run, when all that can be refused is checked; all ranks call it.

        With --no-resume an earlier run is moved aside.
        """
        if is_main_process():
            if self.request.no_resume:
                set_aside(self.output_dir, LEFT)
            write_json(self.output_dir / IDENTITY, self.decisive)
            write_text(self.output_dir / "config.yaml", self.decisive["config"])
            layout = {"ranks": self.runtime.world_size, "device": self.runtime.device.type}
            batch = self.request.batch_size * self.runtime.world_size
            write_json(self.output_dir / RUN_FILE, run_record(self.decisive["datalist"], 0, batch, layout))
        barrier()


@contextmanager
def open_run(request: Request, task: str, resize_scale: float = 1.0) -> Iterator[Setting]:
    """Check recipe, list, weights and network, then hold the output folder and check every case's headers.

    Nothing is in the folder before the weights fit, and nothing of this run but its log before `Setting.begin`. A run that is
    refused after that leaves the folder to others, unless it had saved something.

    Args:
        request: The shared flags.
        task: The recipe's must be this one.
        resize_scale: Divides the recipe's spacing.

    Raises:
        BadInput: What of it cannot be used.
    """
    recipe = _recipe_of(request, task)
    splits = read_downstream_datalist(request.base_data_dir, recipe)
    if task == "segmentation":  # its share is the list's first cases; that of features is drawn by each seed
        splits["training"] = select_percent(splits["training"], request.dataset_percent)
    teacher = open_teacher(request.weights)
    cfg = _config_of(request, teacher, task)
    require_whole(request.method, cfg, request.image_size, request.plan and request.plan.divisor)
    runtime = start_runtime(cfg.train.num_threads, cfg.train.backend, cfg.train.timeout_s)
    setup_logging(rank=runtime.rank)
    with lost_rank_explained(runtime.rank):
        encoder = open_network(request.method, cfg, teacher, task, request.image_size, runtime)
        with run_folder(request.output_dir, runtime) as output_dir:
            setup_logging(output_dir, runtime.rank)
            say_what_was_used(encoder)  # in the folder's log
            decisive = _decisive(request, cfg, recipe, teacher, runtime)
            _check_same_run(decisive, request.no_resume, output_dir, task)
            cases = _checked_cases(request, splits, recipe, resize_scale, output_dir)
            if not teacher.is_untrained and is_main_process():
                warn_of_overlap([Entry(path, ()) for item in splits["test"] for path in item.images], teacher)
            counts = ", ".join(f"{len(items)} {part}" for part, items in splits.items())
            logger.info("%s: %s cases; %s", recipe.name, counts, ", ".join(recipe.output_names))
            try:
                yield Setting(request, cfg, recipe, encoder, cases, output_dir, runtime, teacher.reference, decisive)
            except BadInput:
                if is_main_process() and not _has_saved(output_dir):
                    (output_dir / IDENTITY).unlink(missing_ok=True)
                raise


def _recipe_of(request: Request, task: str) -> Recipe:
    recipe = load_recipe(request.dataset_name)
    if recipe.task != task:
        raise BadInput(
            f"{request.dataset_name}: a recipe for {recipe.task}, not {task}: use dinov2/eval/{PROGRAMS[recipe.task]}"
        )
    if task == "segmentation":
        return recipe
    recipe = with_tertiles(recipe, request.base_data_dir)
    return recipe if recipe.resize is not None else dataclasses.replace(recipe, resize=[request.cube] * 3)


def _config_of(request: Request, teacher: Teacher, task: str) -> DictConfig:
    """The configuration: a file's, or what the weights tell.

    A run that was begun without a file when weights were not asked, on the published defaults, goes on with these.
    """
    if request.method.kind == "vit" and request.config_file is None and not request.no_resume and not teacher.is_untrained:
        before = _identity_of(Path(request.output_dir))
        if before and before.get("config_file") is None:
            defaults = load_and_merge_config_3d(None, request.overrides)
            if _other_words(before["config"], defaults, task) == []:
                return defaults
    return config_of(request.method, teacher, request.config_file, request.overrides)


def _checked_cases(
    request: Request, splits: dict[str, list[Item]], recipe: Recipe, resize_scale: float, output_dir: Path
) -> dict[str, Cases]:
    for items in splits.values():
        check_headers(items, recipe)
    if recipe.task != "segmentation":
        warn_of_skulls(splits["training"], recipe)
    cache = request.cache_dir or output_dir / "cache"
    return {part: Cases(items, recipe, resize_scale, cache) for part, items in splits.items()}


def _decisive(request: Request, cfg: DictConfig, recipe: Recipe, teacher: Teacher, runtime: Runtime) -> dict[str, Any]:
    """What decides the result; a key per flag, with content in the place of the names of files."""
    listed = datalist_path(request.base_data_dir, recipe).read_bytes()
    return {
        **request.flags,
        "ranks": runtime.world_size,
        "config": default_yaml(cfg),
        "recipe": repr(recipe).replace(", ignore=[]", ""),  # a key that came later: runs begun before it go on
        "pretrained_weights": teacher.identity(),
        "datalist": hashlib.sha256(listed).hexdigest(),
    }


def _check_same_run(decisive: dict[str, Any], is_new: bool, output_dir: Path, task: str) -> None:
    """Refuse a folder whose run was decided otherwise; all ranks call it.

    A default that changed since the run began refuses it too, and the refusal names the overrides that continue it.

    Raises:
        BadInput: It is another run, what differs is named; or the ranks were given different things.
    """
    before = None if is_new else _identity_of(output_dir)
    of_ranks = gather_objects(decisive)  # after this line the folder may change
    if any(other != decisive for other in of_ranks):
        raise BadInput("the ranks of this job see different weights or data: start all with the same command and files")
    if before is None:
        return
    words = _other_words(before["config"], _in_todays_schema(decisive["config"]), task)
    told = {"config", "opts"}  # what the overrides did is in the configuration
    differing = sorted(k for k in (before.keys() | decisive.keys()) - told if before.get(k) != decisive.get(k))
    differing += [] if words == [] else ["config"]
    if differing:
        back = f"add to --opts, to continue it: {' '.join(words)}; or " if words and len(words) <= MAX_WORDS else ""
        raise BadInput(
            f"{output_dir}: holds a run with another {', '.join(differing)}: {back}use another --output-dir, or --no-resume, "
            "which moves that run aside"
        )


def _other_words(saved: DictConfig | None, given: DictConfig | None, task: str) -> list[str] | None:
    """What gives a configuration the values of a saved one, as `key=value`; None where that cannot be told.

    Only a segmentation reads the section of that name.
    """
    if saved is None or given is None:
        return None
    read = [name for name, _ in config_keys() if task == "segmentation" or not name.startswith("segmentation.")]
    differing = [name for name in read if OmegaConf.select(saved, name) != OmegaConf.select(given, name)]
    return [f"{name}={_word(OmegaConf.select(saved, name))}" for name in differing]


def _word(value: Any) -> str:
    """A value as an override spells it, without spaces."""
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return plain if isinstance(plain, str) and plain else json.dumps(plain, separators=(",", ":"))


def _identity_of(output_dir: Path) -> dict[str, Any] | None:
    """What decided the folder's run, its configuration in today's schema; None where no run has saved anything.

    Raises:
        BadInput: It cannot be read.
    """
    path = output_dir / IDENTITY
    if not path.exists() or not _has_saved(output_dir):
        return None
    remedy = "use another --output-dir, or --no-resume"
    before = read_json(path, remedy=remedy)
    if not isinstance(before, dict) or not isinstance(before.get("config"), str):
        raise BadInput(f"{path}: is damaged, it holds no configuration: {remedy}")
    return {**before, "config": _in_todays_schema(before["config"])}


def _in_todays_schema(config: str) -> DictConfig | None:
    """A saved configuration, a key that came later with its default; None where it has one that is gone."""
    try:
        content = OmegaConf.to_container(OmegaConf.create(config))
        return OmegaConf.structured(typed_from(Config, content, IDENTITY)) if isinstance(content, dict) else None
    except (ConfigError, yaml.YAMLError, OmegaConfBaseException):
        return None


def _has_saved(output_dir: Path) -> bool:
    return any(folder.joinpath(name).exists() for folder in (output_dir, *output_dir.glob("seed_*")) for name in KEPT)
