"""`dinov2 watch OUT`: how a pretraining goes, on one screen, from the files of its folder alone."""

from __future__ import annotations

import fcntl
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from dinov2.configs import read_yaml
from dinov2.errors import EXIT_OK, BadInput
from dinov2.files import is_number, read_json, user_path
from dinov2.logging.ending import ENDING_COLLAPSED, ENDING_DONE, ENDING_STOPPED
from dinov2.logging.metrics import METRICS_FILE, read_metrics
from dinov2.logging.progress import in_words
from dinov2.logging.setup import Say
from dinov2.logging.warned import WARNINGS_FILE, read_warnings

POLL_S = 2.0
LAST_ROWS = 10  # whose median time a step says how long the rest takes
SILENT_LINES, SILENT_S = 10, 60.0  # times the usual time between two lines, and seconds, after which a run is silent
TAIL_BYTES = 16_384  # of the log, in which its last words are
BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
CURVE_WIDTH = 32
RED, YELLOW, GREEN, BOLD = "31", "33", "32", "1"
GOOD_STATES = ("running", "finished")

Row = dict[str, Any]
Line = tuple[str, str]  # style, text


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run say at a moment.

    Attributes:
        folder: Of the run.
        state: running, silent, finished, stopped, collapsed, failed, dead, or starting.
        last_words: The line of the log that says how the run ended, where one does.
        config: Of `config.yaml`.
        record: Of `run.json`.
        rows: Of the metrics.
        warned: Of `warnings.json`.
        checkpoint: Name and age (s) of the newest whole checkpoint.
        age_s: Since the last line of the metrics.
    """

    folder: Path
    state: str
    last_words: str
    config: dict[str, Any]
    record: dict[str, Any]
    rows: list[Row]
    warned: list[Row]
    checkpoint: tuple[str, float] | None
    age_s: float

    def key(self, section: str, name: str) -> Any:
        part = self.config.get(section)
        return part.get(name) if isinstance(part, dict) else None

    @property
    def total(self) -> int | None:
        epochs, length = self.key("optim", "epochs"), self.key("train", "OFFICIAL_EPOCH_LENGTH")
        return int(epochs * length) if is_number(epochs) and is_number(length) else None

    @property
    def layout(self) -> dict[str, Any]:
        layout = self.record.get("layout")
        return layout if isinstance(layout, dict) else {}


def run_of(given: Path) -> Path:
    """The folder of a run: the one that is given, or of a chain of stages the one that wrote last.

    Raises:
        BadInput: No run is there.
    """
    folder = Path(user_path(given))
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder: give the --output-dir of a pretraining")
    if any((folder / name).exists() for name in (METRICS_FILE, "run.json", ".lock")):
        return folder
    stages = sorted((p.parent for p in folder.glob("*/run.json")), key=lambda p: (p / "run.json").stat().st_mtime)
    if not stages:
        raise BadInput(f"{folder}: no pretraining has written there yet (no {METRICS_FILE}): give its --output-dir")
    return stages[-1]


def read_run(folder: Path, now: float) -> RunFiles:
    """Read a run's files.

    Args:
        folder: Of the run.
        now: Seconds since the epoch.

    Raises:
        BadInput: One of them is damaged.
    """
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    record = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    rows, metrics = read_metrics(folder / METRICS_FILE), folder / METRICS_FILE
    age_s = now - metrics.stat().st_mtime if metrics.exists() else 0.0
    checkpoints = sorted(p.parent for p in folder.glob("checkpoints/[0-9]*/.metadata"))
    newest = (checkpoints[-1].name, now - checkpoints[-1].stat().st_mtime) if checkpoints else None
    known = RunFiles(
        folder, "", "", config if isinstance(config, dict) else {}, record if isinstance(record, dict) else {}, rows,
        read_warnings(folder), newest, age_s,
    )  # fmt: skip
    state, words = _state(known)
    return RunFiles(**{**vars(known), "state": state, "last_words": words})


def _state(run: RunFiles) -> tuple[str, str]:
    if is_locked(run.folder):
        if not run.rows:
            return "starting", ""
        return ("silent" if run.age_s > SILENT_LINES * _line_s(run) + SILENT_S else "running"), ""
    if run.rows and run.total and run.rows[-1]["iteration"] + 1 >= run.total:
        return "finished", ""
    return last_words(run.folder / "log.txt")


def is_locked(folder: Path) -> bool:
    """Whether a run holds the folder; asked for a moment, in a way that two who ask do not disturb each other."""
    try:
        with (folder / ".lock").open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def last_words(log: Path) -> tuple[str, str]:
    """How the last start of a run ended by its log: stopped, collapsed, failed, finished, or dead where it says nothing."""
    text = ""
    if log.exists():
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    endings = {ENDING_DONE: "finished", ENDING_STOPPED: "stopped", ENDING_COLLAPSED: "collapsed"}
    for line in reversed(text.splitlines()):
        parts = re.match(r"\S+ (\w) \S+: (.*)", line)
        if parts is None:
            continue
        level, message = parts.groups()
        for beginning, state in endings.items():
            if message.startswith(beginning):
                return state, message
        if level == "E":
            return "failed", message
        if message.startswith(("[", "iterations ")):  # it trained, and said no more
            break
    return "dead", "its log ends without a word, as after kill -9, a lost machine or a full memory"


def _line_s(run: RunFiles) -> float:
    """Usual seconds between two lines of the metrics."""
    times = [r["iter_time"] for r in run.rows[-LAST_ROWS:] if is_number(r.get("iter_time"))]
    period = run.key("train", "log_period")
    return median(times) * (period if is_number(period) else 1) if times else 0.0


# ---------------------------------------------------------------------- on the screen


def summary(run: RunFiles, bars: str = BARS) -> list[Line]:
    """The lines of the screen, a style and a text each."""
    lines = [(BOLD, _title(run)), _progress(run, bars)]
    if run.last_words:
        lines.append(("", f"           {run.last_words}"))
    last = run.rows[-1] if run.rows else {}
    for name, text in (
        ("loss", _loss(run, bars)),
        ("entropy", _entropies(run, last)),
        (
            "tokens",
            _numbers(last, {"rank": "feature_rank", "mean cosine": "mean_cosine", "prototypes": "prototypes_used"}, ".3g"),
        ),
        ("speed", _speed(last)),
        ("step", _step(last)),
        ("cost", _cost(run)),
        ("saved", _saved(run)),
    ):
        if text:
            lines.append(("", f"{name:10} {text}"))
    return [*lines, *_warnings(run)]


def _title(run: RunFiles) -> str:
    what = [f"{run.key('train', 'objective') or ''} {run.key('student', 'arch') or ''}".strip()]
    if is_number(run.record.get("effective_batch")):
        what.append(f"{run.record['effective_batch']} volumes a step of {run.record.get('num_volumes', '?')}")
    if run.layout:
        what.append(f"{run.layout.get('ranks', 1)} x {run.layout.get('device', '?')}")
    return f"{run.folder}: {', '.join(w for w in what if w)}"


def _progress(run: RunFiles, bars: str) -> Line:
    style = GREEN if run.state in GOOD_STATES else YELLOW if run.state in ("starting", "stopped", "silent") else RED
    if not run.rows:
        return style, f"{run.state.upper():10} no iteration is logged yet"
    done, total = int(run.rows[-1]["iteration"]) + 1, run.total
    text = f"{run.state.upper():10} {done:,}"
    if total:
        filled = min(20, 20 * done // total)
        full, empty = ("█", "░") if bars == BARS else ("#", ".")
        text += f" of {total:,} {full * filled}{empty * (20 - filled)} {done / total:.0%}"
    if run.state == "running" and total:
        times = [r["iter_time"] for r in run.rows[-LAST_ROWS:] if is_number(r.get("iter_time"))]
        left = (total - done) * median(times) if times else 0.0
        text += f", {in_words(left)} left, until {_moment(left)}"
    elif run.state != "finished":
        text += f", last line {in_words(max(0.0, run.age_s))} ago"
        if run.state == "silent":
            text += f" (usually every {in_words(_line_s(run))})"
        if run.state in ("stopped", "dead"):
            text += ": the same command continues"
    return style, text


def _moment(seconds: float) -> str:
    form = "%H:%M" if seconds < 86_400 else "%d %b %H:%M"
    return time.strftime(form, time.localtime(time.time() + seconds))


def _loss(run: RunFiles, bars: str) -> str:
    losses = [r["total_loss"] for r in run.rows if is_number(r.get("total_loss"))]
    if not losses:
        return ""
    return f"{losses[-1]:.3f} {curve(losses, bars)} from {losses[0]:.3f}, lowest {min(losses):.3f}"


def curve(values: Sequence[float], bars: str = BARS, width: int = CURVE_WIDTH) -> str:
    """A line of bars, each the mean of a stretch of the values."""
    count = min(width, len(values))
    means = [fmean(values[i * len(values) // count : (i + 1) * len(values) // count]) for i in range(count)]
    low, span = min(means), max(means) - min(means)
    return "".join(bars[min(len(bars) - 1, int(len(bars) * (m - low) / span))] if span > 0 else bars[0] for m in means)


def _entropies(run: RunFiles, last: Row) -> str:
    text = _numbers(last, {"student": "student_entropy", "teacher": "teacher_entropy"})
    prototypes = run.key("dino", "head_n_prototypes")
    return f"{text} of log K {math.log(prototypes):.2f}" if text and is_number(prototypes) and prototypes > 0 else text


def _numbers(last: Row, names: dict[str, str], form: str = ".2f") -> str:
    return ", ".join(f"{name} {last[key]:{form}}" for name, key in names.items() if is_number(last.get(key)))


def _speed(last: Row) -> str:
    shares = _numbers(last, {"data wait": "data_wait", "mfu": "mfu", "waits for a core": "cpu_wait"}, ".0%")
    return ", ".join(
        part
        for part in (
            f"{last['iter_time']:.2f} s/step" if is_number(last.get("iter_time")) else "",
            f"{last['volumes_per_s']:.1f} volumes/s" if is_number(last.get("volumes_per_s")) else "",
            shares,
            f"{last['memory_gib']:.1f} GiB" if is_number(last.get("memory_gib")) else "",
        )
        if part
    )


def _step(last: Row) -> str:
    text = _numbers(last, {"lr": "lr", "teacher temperature": "teacher_temp", "gradient": "grad_norm_backbone"}, ".3g")
    return f"{text}, {last['skipped_steps']:.0f} skipped" if last.get("skipped_steps") else text


def _cost(run: RunFiles) -> str:
    """Device-hours of the logged iterations, and of those to come at the present pace."""
    seconds, before = 0.0, -1.0
    for row in run.rows:
        if is_number(row.get("iter_time")):
            seconds += row["iter_time"] * (row["iteration"] - before)
        before = row["iteration"]
    if not seconds:
        return ""
    ranks: Any = run.layout.get("ranks") if is_number(run.layout.get("ranks")) else 1
    kind = "GPU" if run.layout.get("device") == "cuda" else "process"
    text = f"{seconds * ranks / 3600:.2f} {kind}-hours so far"
    left = (run.total or 0) - before - 1
    times = [r["iter_time"] for r in run.rows[-LAST_ROWS:] if is_number(r.get("iter_time"))]
    return f"{text}, {left * median(times) * ranks / 3600:.2f} to come" if left > 0 and times else text


def _saved(run: RunFiles) -> str:
    if run.checkpoint is None:
        return "no checkpoint yet" if run.rows else ""
    name, age_s = run.checkpoint
    period = run.key("train", "checkpoint_period")
    often = f" (every {period} iterations)" if is_number(period) else ""
    return f"checkpoint {name}, {in_words(max(0.0, age_s))} ago{often}"


def _warnings(run: RunFiles) -> list[Line]:
    if not run.warned:
        return [("", f"{'warnings':10} none")]
    heading = f"{'warnings':10} {len(run.warned)}, the last ones:"
    said = [f"  {int(w['iteration']):>8,} {w['name']}: {w.get('message', '')}" for w in run.warned[-5:]]
    return [(YELLOW, heading), *((YELLOW, text) for text in said)]


def drawn(lines: Sequence[Line], width: int, height: int, has_colour: bool) -> str:
    """The lines cut to a screen, in colour where it has any."""
    shown = [(style, "".join(c if c.isprintable() else "?" for c in text)[:width]) for style, text in lines[:height]]
    return "\n".join(f"\033[{style}m{text}\033[0m" if style and has_colour else text for style, text in shown)


# ---------------------------------------------------------------------- the command


def watch(given: Path, once: bool, say: Say, wait: Callable[[float], None] = time.sleep) -> int:
    """Show a run; again whenever its files grow, until it has finished or Ctrl-C.

    Args:
        given: Folder of the run.
        once: Show it once.
        say: Takes what is shown.
        wait: Sleeps.

    Raises:
        BadInput: There is no run, or its files are damaged.
    """
    is_terminal = sys.stdout.isatty()
    can_draw = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    for run in [read_run(run_of(given), time.time())] if once else _changes(given, wait):
        columns, rows = shutil.get_terminal_size((120, 40))
        has_colour = is_terminal and not os.environ.get("NO_COLOR")
        text = drawn(summary(run, BARS if can_draw else PLAIN_BARS), columns if is_terminal else 1000, rows - 1, has_colour)
        say(text if once or not is_terminal else f"\033[H\033[2J{text}")
        sys.stdout.flush()
    return EXIT_OK


def _changes(given: Path, wait: Callable[[float], None]) -> Iterator[RunFiles]:
    """The run now, and whenever it says more or another state begins."""
    seen: object = None
    try:
        while True:
            folder = run_of(given)
            paths = [folder / name for name in (METRICS_FILE, WARNINGS_FILE, "checkpoints", "log.txt")]
            stamp = (folder, is_locked(folder), *((p.stat().st_size, p.stat().st_mtime) if p.exists() else None for p in paths))
            is_old = isinstance(seen, tuple) and seen[0] == stamp and time.monotonic() - seen[1] < SILENT_S
            if not is_old:
                run = read_run(folder, time.time())
                seen = stamp, time.monotonic()
                yield run
                if run.state in ("finished", "collapsed"):
                    return
            wait(POLL_S)
    except KeyboardInterrupt:
        return
