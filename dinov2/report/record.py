"""What every run's folder says of itself: metrics, `run.json`, `log.txt`, configuration, as lines and tables of the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinov2.configs import Config, ConfigError, config_keys
from dinov2.configs.loader import read_saved_config
from dinov2.errors import BadInput
from dinov2.files import is_number, read_json, read_text
from dinov2.logging import read_metrics
from dinov2.logging.metrics import METRICS_FILE
from dinov2.visual.figure_page import Chapter, Table

RUN_FILE = "run.json"  # of `logging/provenance.py`, which brings torch
CONFIG, LOG = "config.yaml", "log.txt"
MOST_LINES = 8  # of a kind that a page lists; the rest is counted
MOST_LOG_BYTES = 2**28

_STARTED = re.compile(r"iterations (\d+) to (\d+), ")
_STOPPED = re.compile(r"stopped after iteration (\d+) on ([^;]+);|stopped after iteration (\d+): start")
_SKIPPED = re.compile(r"iteration (\d+): (?:loss or gradient|the loss) is not finite, step skipped(.*)")
_UNUSABLE = re.compile(r"unusable volume (\d+), replaced: (.*)")
_VALIDATED = re.compile(r"iteration (\d+): loss ([^ ,]+), validation Dice ([^ ]+) \(best")


@dataclass
class Log:
    """What `log.txt` tells of a run since it began anew.

    Attributes:
        starts: First iterations of its processes; the first one is 0.
        stops: Iteration and reason of those that were asked to stop.
        skipped: Iteration and what is said of it.
        unusable: What is said of each volume that was replaced.
        validated: Iteration, loss and Dice of a segmentation's validations.
    """

    starts: list[int] = field(default_factory=list)
    stops: list[tuple[int, str]] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    validated: list[tuple[int, float, float]] = field(default_factory=list)

    @property
    def resumes(self) -> list[int]:
        """Iterations at which it went on after a stop or a kill."""
        return [start for start in self.starts if start > 0]


@dataclass(frozen=True)
class Rows:
    """The lines of a metrics file, and whether its last one was cut."""

    values: list[dict[str, Any]]
    is_cut: bool


def read_rows(folder: Path, name: str = METRICS_FILE) -> Rows:
    """The metrics of a folder; none where the file is not there.

    Raises:
        BadInput: It cannot be read, or a whole line of it is damaged.
    """
    path = folder / name
    try:
        rows = read_metrics(path)
        is_cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    except OSError as err:
        raise BadInput(f"{path}: {err.strerror}: make it readable, or move it away") from err
    return Rows([dict(row) for row in rows], is_cut)


def read_log(folder: Path) -> Log:
    """What the log tells; nothing where there is none.

    Raises:
        BadInput: It cannot be read.
    """
    log = Log()
    if not (folder / LOG).exists():
        return log
    for line in read_text(folder / LOG, most_bytes=MOST_LOG_BYTES).splitlines():
        if found := _STARTED.search(line):
            if int(found[1]) == 0:
                log = Log()
            log.starts.append(int(found[1]))
        elif found := _STOPPED.search(line):
            log.stops.append((int(found[1] or found[3]), found[2] or "a signal"))
        elif found := _SKIPPED.search(line):
            log.skipped.append((int(found[1]), found[2].strip("; ")))
        elif found := _UNUSABLE.search(line):
            log.unusable.append(found[2])
        elif found := _VALIDATED.search(line):
            log.validated.append((int(found[1]), _number(found[2]), _number(found[3])))
    return log


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return float("nan")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; empty where there is no file.

    Raises:
        BadInput: It is damaged, or holds something else.
    """
    if not path.exists():
        return {}
    content = read_json(path, remedy="move it away, or run its program again")
    if not isinstance(content, dict):
        raise BadInput(f"{path}: holds a {type(content).__name__}, no record of a run: move it away")
    return content


@dataclass(frozen=True)
class RunConfig:
    """`config.yaml` of a folder.

    Attributes:
        text: As it lies there; empty: there is none.
        cfg: In today's schema; None where it does not fit.
        problem: Why not.
    """

    text: str
    cfg: DictConfig | None
    problem: str


def read_config(folder: Path) -> RunConfig:
    """The configuration that a run had.

    Raises:
        BadInput: It cannot be read as text.
    """
    path = folder / CONFIG
    if not path.exists():
        return RunConfig("", None, f"There is no {CONFIG}.")
    text = read_text(path)
    try:
        return RunConfig(text, read_saved_config(path), "")
    except ConfigError as err:
        return RunConfig(text, None, f"The configuration cannot be read by this version: {err}")


def config_chapter(config: RunConfig) -> Chapter:
    """What differs from the defaults, and all of it, folded."""
    chapter = Chapter("Configuration", lines=[config.problem] if config.problem else [])
    if config.cfg is not None:
        defaults = OmegaConf.structured(Config)
        rows = []
        for name, of in config_keys():
            value, default = (_plain(OmegaConf.select(cfg, name)) for cfg in (config.cfg, defaults))
            if value != default:
                rows.append((name, shown(value), shown(default), of.metadata.get("meaning", "")))
        if rows:
            caption = "What differs from the defaults of this version."
            chapter.tables.append(Table(("key", "this run", "default", "meaning"), rows, caption))
        else:
            chapter.lines.append("All keys have the defaults of this version.")
    if config.text:
        chapter.folded.append((f"The whole {CONFIG}", config.text))
    return chapter


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def environment_chapter(run: Mapping[str, Any], extra: Sequence[tuple[str, str]] = ()) -> Chapter:
    """Versions, revision, device, ranks, command: what `run.json` holds of the last start."""
    chapter = Chapter("Environment")
    if not run:
        chapter.lines.append(f"There is no {RUN_FILE}: what it ran on is not known.")
        return chapter
    rows = [(name, shown(version)) for name, version in _items(run.get("versions"))]
    git = dict(_items(run.get("git")))
    if git:
        rows.append(("commit", f"{git.get('commit', '?')}{', changed files' if git.get('modified') else ''}"))
    rows += [(name, shown(value)) for name, value in _items(run.get("layout"))]
    names = {"num_threads": "threads of a process", "datalist_sha256": "hash of the list", "num_volumes": "volumes listed"}
    rows += [(name, shown(run[key])) for key, name in names.items() if run.get(key)]
    command = run.get("command")
    if isinstance(command, list):
        rows.append(("command", " ".join(map(str, command))))
    chapter.tables.append(Table(("", "at the last start"), [*rows, *extra], ""))
    return chapter


def _items(content: Any) -> list[tuple[str, Any]]:
    return list(content.items()) if isinstance(content, dict) else []


def shown(value: Any, digits: int = 6) -> str:
    """A value of JSON or YAML for a person."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(v, digits) for v in value) or "none"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value) if value != "" else "(empty)"


def some(lines: Sequence[str]) -> list[str]:
    """The first of many lines, and how many more there are."""
    more = [f"and {len(lines) - MOST_LINES:,} more"] if len(lines) > MOST_LINES else []
    return [*lines[:MOST_LINES], *more]


def device_hours(rows: Sequence[Mapping[str, Any]], starts: Sequence[int], default_ranks: int = 1) -> float:
    """Hours of all ranks' devices: each step's time, as its logged row has it, times the ranks of that row.

    A row's `iter_time` is the mean of the steps since the row before, or since the process began; steps before a stop that no
    row tells of take what those before them took.
    """
    seconds, before, rate = 0.0, -1, 0.0
    for row in rows:
        iteration = int(row["iteration"])
        own = float(row["iter_time"]) if is_number(row.get("iter_time")) else rate
        first = max([start for start in starts if before < start <= iteration], default=before + 1)
        own_steps, earlier = iteration - first + 1, first - before - 1
        seconds += ranks_of(row, default_ranks) * (own_steps * own + earlier * (rate or own))
        before, rate = iteration, own
    return seconds / 3600


def ranks_of(row: Mapping[str, Any], default: int = 1) -> int:
    """Of a row of a pretraining: its effective batch over that of one rank."""
    sizes = [row.get(name) for name in ("effective_batch", "current_batch_size")]
    effective, of_rank = (float(size) if is_number(size) and size else 0.0 for size in sizes)
    return max(1, round(effective / of_rank)) if of_rank else default
