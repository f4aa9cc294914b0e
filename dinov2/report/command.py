"""`dinov2 report OUT`: one page of a run's folder, whatever program left it.

Reading order: `report` -> `kind_of` (told from what lies in the folder) -> the kind's own page.
"""

from __future__ import annotations

from pathlib import Path

from dinov2.errors import EXIT_OK, BadInput
from dinov2.files import refuse_output, user_path, write_text
from dinov2.logging import Say
from dinov2.logging.metrics import METRICS_FILE
from dinov2.report.evaluations import IDENTITY, evaluation_page, probe_page
from dinov2.report.pretraining import pretraining_page
from dinov2.report.record import CONFIG, RUN_FILE, read_object

PAGE = "report.html"
PRETRAINING, EVALUATION, PROBE, STUDY = "pretraining", "evaluation", "probe", "study"
TABLES = ("items.csv", "runs.csv")  # of a study
STUDY_PAGE = Path("figures") / PAGE
MOST_NAMED = 5  # runs below a folder that is none


def report(folder: Path, output: Path | None, scan: Path | None, has_examples: bool, say: Say) -> int:
    """Write the page of a run.

    Args:
        folder: Of a pretraining, segmentation, classification, regression, probe or study.
        output: The HTML file; None: `report.html` in the folder.
        scan: Of a pretraining: shown through its checkpoints in place of a volume of its list.
        has_examples: Of a pretraining: draw crops, masks and PCA, which need its data and torch.
        say: Takes each line.

    Raises:
        BadInput: No such run, nothing to show yet, a damaged file, or a page that cannot be written.
    """
    folder = Path(user_path(folder))
    output = Path(user_path(output)) if output is not None else folder / PAGE
    kind = kind_of(folder)
    refuse_output(output, "--output")
    if scan is not None and (kind != PRETRAINING or not has_examples):
        raise BadInput(f"--scan {scan}: is shown through the checkpoints of a pretraining: leave it out here")
    if kind == PRETRAINING:
        page = pretraining_page(folder, scan, has_examples)
    elif kind == STUDY:
        page = study_page(folder)
    else:
        page = (probe_page if kind == PROBE else evaluation_page)(folder)
    try:
        write_text(output, page)
    except OSError as err:
        raise BadInput(f"--output {output}: {err.strerror}: choose another file") from err
    say(f"{output}: the {kind} in {folder}, {output.stat().st_size / 2**20:.1f} MiB; open it in a browser")
    return EXIT_OK


def kind_of(folder: Path) -> str:
    """Which program left a folder.

    Raises:
        BadInput: None of ours, or one that has nothing to show.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise BadInput(f"{folder}: {what}: give the output folder of a run")
    if (folder / IDENTITY).is_file():
        return PROBE if read_object(folder / IDENTITY).get("program") == "probe" else EVALUATION
    if any((folder / name).is_file() for name in TABLES) or (folder / STUDY_PAGE).is_file():
        return STUDY
    if (folder / METRICS_FILE).is_file():
        return PRETRAINING
    if (folder / RUN_FILE).is_file() or (folder / CONFIG).is_file():
        raise BadInput(f"{folder}: has no {METRICS_FILE}: nothing has been logged yet: let the run go on")
    if (folder / "cells").is_dir():
        raise BadInput(f"{folder}: a study without tables: `dinov2 study collect STUDY`, then `dinov2 study report STUDY`")
    raise BadInput(f"{folder}: no run's output folder{_runs_below(folder)}")


def _runs_below(folder: Path) -> str:
    """What to give instead, as words of a message."""
    below = sorted({path.parent.name for name in (RUN_FILE, METRICS_FILE, *TABLES) for path in folder.glob(f"*/{name}")})
    if not below:
        return f" (no {METRICS_FILE}, no {IDENTITY}, no study's {TABLES[1]}): give one"
    return f", but {', '.join(below[:MOST_NAMED])}{' and others' * (len(below) > MOST_NAMED)} in it may be: give one of them"


def study_page(folder: Path) -> str:
    """The page that `dinov2 study report` drew: its pictures and tests need the study's file and recipes, which lie elsewhere.

    Raises:
        BadInput: It has not been drawn, or the tables are newer.
    """
    page = folder / STUDY_PAGE
    again = "draw it by `dinov2 study report STUDY`"
    if not page.is_file():
        raise BadInput(f"{folder}: a study whose figures are not drawn yet (no {STUDY_PAGE}): {again}")
    newer = [name for name in TABLES if (folder / name).is_file() and (folder / name).stat().st_mtime > page.stat().st_mtime]
    if newer:
        raise BadInput(f"{page}: is older than {newer[0]}: {again} again")
    return page.read_text("utf-8")
