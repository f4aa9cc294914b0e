"""What the folder of a cell holds, and what state that is.

    cells/BTCV/3DINO/25/0/
      cell.json       what it was begun with: flags, a hash of its cases in each part
      cell.lock       held by whoever runs it, and by all its processes
      cell.log        what the program said
      failed.json     the exit code and reason of the last try, where it failed
      ...             what the program writes: results.json, per_case.csv or predictions.csv, checkpoints

A cell is finished when its results are whole; nothing else says so, so that nothing can say it wrongly.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dinov2.errors import BadInput
from dinov2.eval.study.cells import Cell
from dinov2.files import is_number, lock, read_json, read_text

logger = logging.getLogger("dinov2.eval.study")

IDENTITY, LOCK, LOG, FAILED, RESULTS = "cell.json", "cell.lock", "cell.log", "failed.json", "results.json"
SAVED = ("checkpoint.pth", "best_model.pth", "probe.pth", RESULTS)  # what a program goes on from, or came to
PENDING, UNFINISHED, RUNNING, FINISHED = "pending", "unfinished", "running", "finished"
FAILURE, DAMAGED, CHANGED = "failed", "damaged", "changed"
STATES = (FINISHED, RUNNING, UNFINISHED, FAILURE, DAMAGED, CHANGED, PENDING)
TABLES = {"segmentation": "per_case.csv", "classification": "predictions.csv"}
MOST_NAMED = 8  # changed cells that a line names
_NEEDED = {"segmentation": ("test_dice", "test"), "classification": ("test_auc", "test_auc_per_class", "classes", "n_test")}


@dataclass(frozen=True)
class State:
    """Of a cell: one of `STATES`, and why."""

    name: str
    reason: str = ""


@dataclass(frozen=True)
class Result:
    """What a finished cell came to.

    Attributes:
        run: `results.json`.
        rows: Its table of cases, as text by column; an empty cell stays empty.
    """

    run: dict[str, Any]
    rows: list[dict[str, str]]


def state_of(cell: Cell) -> State:
    """Of a cell, from what its folder holds."""
    changed = changes(cell)
    if changed:
        return State(CHANGED, changed)
    if is_held(cell.folder):
        return State(RUNNING)
    if (cell.folder / RESULTS).exists():
        try:
            read_result(cell)
        except BadInput as err:
            return State(DAMAGED, str(err))
        return State(FINISHED)
    if (cell.folder / FAILED).exists():
        return State(FAILURE, failure(cell.folder))
    return State(UNFINISHED if (cell.folder / LOG).exists() else PENDING)


def failure(folder: Path) -> str:
    """Why the last try of a cell failed."""
    try:
        content = read_json(folder / FAILED)
    except BadInput as err:
        return str(err)
    return str(content.get("reason")) if isinstance(content, dict) else "unknown"


def changes(cell: Cell) -> str:
    """How what a cell is asked for now differs from what it was begun with; empty where it does not, or has saved nothing.

    Cases that cannot be looked up now are not compared.
    """
    if not any((cell.folder / name).exists() for name in SAVED):
        return ""
    before, now = identity_of(cell.folder), cell.identity()
    if before is None:
        return f"holds a run without a readable {IDENTITY}"
    old, new = before["settings"], now["settings"]
    differing = [
        f"{name} was {old.get(name, 'not given')}, is {new.get(name, 'not given')}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
    if before["parts"] and now["parts"]:
        lists = [f"other {name} cases" for name in now["parts"] if before["parts"].get(name) != now["parts"][name]]
        differing += lists + (["another recipe"] if before.get("recipe") != now["recipe"] else [])
    return ", ".join(differing)


def identity_of(folder: Path) -> dict[str, Any] | None:
    """What a cell was begun with; None where that cannot be read."""
    try:
        content = read_json(folder / IDENTITY)
    except BadInput:
        return None
    ok = isinstance(content, dict) and all(isinstance(content.get(name), dict) for name in ("settings", "parts"))
    return content if ok else None


def read_result(cell: Cell) -> Result:
    """The results of a cell, whole.

    Raises:
        BadInput: They are not there, or damaged: what is wrong with which file.
    """
    path = cell.folder / RESULTS
    run = read_json(path)
    if not isinstance(run, dict) or not _is_whole(run, cell.task):
        raise BadInput(f"{path}: damaged, lacks one of {', '.join(_NEEDED[cell.task])}, or what belongs into it")
    table = cell.folder / TABLES[cell.task]
    rows = _read_table(table, run, cell.task)
    num_cases = len({row["case"] for row in rows})
    expected = run["test"].get("num_cases") if cell.task == "segmentation" else run["n_test"]
    if num_cases != expected:
        raise BadInput(f"{table}: has {num_cases} cases, {RESULTS} {expected}")
    if cell.parts and cell.parts["test"].count != num_cases:
        raise BadInput(f"{table}: has {num_cases} cases, the list's test part {cell.parts['test'].count}")
    return Result(run, rows)


def _is_whole(run: dict[str, Any], task: str) -> bool:
    """Whether `results.json` has what a table needs, in its form."""
    if any(name not in run for name in _NEEDED[task]):
        return False
    if task == "classification":
        return isinstance(run["classes"], list) and isinstance(run["test_auc_per_class"], list)
    test = run["test"]
    if not isinstance(test, dict) or not isinstance(test.get("per_class"), dict):
        return False
    return all(isinstance(scores, dict) for scores in (*test["per_class"].values(), test.get("mean")))


def _read_table(path: Path, run: dict[str, Any], task: str) -> list[dict[str, str]]:
    """Rows of a table whose every row is whole, each case and class once.

    Raises:
        BadInput: They are not.
    """
    needed, numbers = ("case", "class"), ["dice", "hd95_mm", "nsd", "volume_error_ml"]
    if task == "classification":
        needed, numbers = ("case", "label"), [f"p_{name}" for name in run["classes"]]
    text = read_text(path)
    rows = list(csv.DictReader(io.StringIO(text)))
    where = f"{path}: damaged, perhaps half-written"
    if not rows or not text.endswith("\n") or not {*needed, *numbers} <= rows[0].keys():
        raise BadInput(f"{where}: no rows with {', '.join((*needed, *numbers))}")
    for i, row in enumerate(rows, 2):
        if None in row or any(value is None for value in row.values()):
            raise BadInput(f"{where}: line {i} has other columns than the first")
        if not all(_is_number_or_empty(row[name]) for name in numbers):
            raise BadInput(f"{where}: line {i} has a word where a number is expected")
    if task == "segmentation":
        _require_every_class(rows, run["test"]["per_class"], where)
    return rows


def _require_every_class(rows: Sequence[dict[str, str]], classes: dict[str, Any], where: str) -> None:
    found = [(row["case"], row["class"]) for row in rows]
    cases = dict.fromkeys(case for case, _ in found)
    if sorted(found) != sorted((case, name) for case in cases for name in classes):
        raise BadInput(f"{where}: not every case has each of {', '.join(classes)} once")


def _is_number_or_empty(word: str) -> bool:
    if not word:
        return True
    try:
        return is_number(float(word))
    except ValueError:
        return False


def is_held(folder: Path) -> bool:
    """Whether some process runs a cell now."""
    if not (folder / LOCK).exists():
        return False
    handle = hold(folder)
    if handle is None:
        return True
    handle.close()
    return False


def hold(folder: Path) -> IO[str] | None:
    """The lock of a cell's folder, until the file is closed here and in all processes that it was handed to; None: it is held.

    Raises:
        BadInput: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / LOCK, "a")  # noqa: SIM115 - it outlives this function
    except OSError as err:
        raise BadInput(f"{folder}: {err.strerror}: choose another output_dir") from err
    if not lock(handle, patience=0):
        handle.close()
        return None
    return handle


def set_aside(folder: Path, names: Sequence[str]) -> Path:
    """Move files of a cell into `previous_<n>`; the folder that they are in now."""
    number = 1 + len(list(folder.glob("previous_*")))
    target = folder / f"previous_{number}"
    target.mkdir()
    for name in names:
        if (folder / name).exists():
            os.rename(folder / name, target / name)
    return target


def refuse_changed(cells: Iterable[Cell]) -> None:
    """Refuse cells that hold work of other settings.

    Raises:
        BadInput: There are some; each is named with what differs.
    """
    changed = {cell.name: changes(cell) for cell in cells}
    named = [f"{name}: {what}" for name, what in changed.items() if what]
    if named:
        more = f"; and {len(named) - MOST_NAMED} more, which `study status` lists" if len(named) > MOST_NAMED else ""
        raise BadInput(
            f"{len(named)} cells ran before the study was changed ({'; '.join(named[:MOST_NAMED])}{more}): undo the change, "
            "choose another output_dir, or `study run --rerun-changed`, which moves what they hold aside"
        )


def move_changed_aside(cells: Iterable[Cell]) -> None:
    """Move what changed cells hold into `previous_<n>` of their folders, so that they begin anew.

    Raises:
        BadInput: One is running.
    """
    for cell in cells:
        what = changes(cell)
        if not what:
            continue
        held = hold(cell.folder)
        if held is None:
            raise BadInput(f"{cell.name}: is running with other settings ({what}): wait for it, or stop it")
        with held:
            names = [p.name for p in cell.folder.iterdir() if p.name != LOCK and not p.name.startswith("previous_")]
            aside = set_aside(cell.folder, names)
        logger.info("%s: %s: what it held is in %s", cell.name, what, aside)
