"""`dinov2 study plan|run|status|collect|report STUDY`: a comparison of methods, declared in one file."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Callable, Sequence

from dinov2.configs.errors import nearest
from dinov2.errors import EXIT_OK, BadInput
from dinov2.eval.study import records
from dinov2.eval.study.cells import Cell, cells_of, labelled_sets
from dinov2.eval.study.figures import Drawn, draw_study
from dinov2.eval.study.plan import disk_problem, estimate, plan, problems_of
from dinov2.eval.study.report import report
from dinov2.eval.study.runner import run_cells
from dinov2.eval.study.schema import Study, load_study
from dinov2.eval.study.table import collect
from dinov2.logging import Say
from dinov2.optional import DRAWING, require

logger = logging.getLogger("dinov2.eval.study")

WHAT = {
    "plan": "say what is missing, and the iterations, hours and memory of every cell",
    "run": "run the cells that are not finished, then collect",
    "status": "say how far every cell is, and why those that failed did",
    "collect": "write the tables of all finished cells",
    "report": "say the headline numbers and draw the figures, from the tables",
}


def build_parser() -> argparse.ArgumentParser:
    """The flags of all actions."""
    actions = "\n".join(f"  {name:9} {what}" for name, what in WHAT.items())
    parser = argparse.ArgumentParser("dinov2 study", description=f"A comparison of methods, declared in a file.\n\n{actions}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", choices=WHAT, metavar="ACTION", help="what to do, as above")
    parser.add_argument("study", metavar="STUDY", help="a YAML file, or a name of configs/eval/studies")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the study, as base_data_dir=DATA")
    add = parser.add_argument_group("run").add_argument
    add("--jobs", type=int, help="cells at a time; default: one, or one per GPU of --gpus")
    add("--gpus", help="numbers of GPUs, as 0,1,2,3: each cell has one of them to itself")
    add("--cells", help="only these, as BTCV/3DINO/25/0,BTCV/Random/25/0")
    moved = "begin cells anew that ran before the study was changed; what they hold is moved aside"
    add("--rerun-changed", action="store_true", help=moved)
    add = parser.add_argument_group("report").add_argument
    add("--no-figures", action="store_true", help="only the numbers")
    panels = "panels of three test cases of each segmentation too, predicted again by the cells' best networks"
    add("--predictions", action="store_true", help=panels)
    return parser


def main(argv: Sequence[str], say: Say) -> int:
    """The words after `dinov2 study`; returns the exit code.

    Raises:
        BadInput: A study that cannot be used.
    """
    args = build_parser().parse_intermixed_args(argv)
    study = load_study(args.study, args.overrides)
    if args.action == "run":
        return run(study, args, say)
    if args.jobs is not None or args.gpus or args.cells or args.rerun_changed:
        raise BadInput(f"dinov2 study {args.action}: --jobs, --gpus, --cells and --rerun-changed are of run: leave them out")
    if (args.no_figures or args.predictions) and args.action != "report":
        raise BadInput(f"dinov2 study {args.action}: --no-figures and --predictions are of report: leave them out")
    if args.no_figures and args.predictions:
        raise BadInput("dinov2 study report: --predictions draws figures: leave --no-figures out")
    if args.action == "report" and not args.no_figures:
        require("a study's figures (without: --no-figures)", *DRAWING)
    code = {"plan": plan, "status": status, "collect": collect, "report": report}[args.action](study, say)
    if args.action == "report" and not args.no_figures:
        draw_study(study, say, _predictions() if args.predictions else None)
    return code


def _predictions() -> Callable[[Study, Drawn], None]:
    from dinov2.eval.study.predicted import draw_predictions  # here: it needs torch

    return draw_predictions


def run(study: Study, args: argparse.Namespace, say: Say) -> int:
    """Run what is not finished; when all of the study is, write its tables.

    Raises:
        BadInput: Something is missing, or cells ran before the study was changed.
    """
    sets = labelled_sets(study)
    every = cells_of(study, sets)
    cells = chosen(every, args.cells.split(",") if args.cells else [])
    problems = problems_of(study, sets, cells)
    if problems:
        raise BadInput(f"{study.name}: {'; '.join(problems)} (`dinov2 study plan` says all)")
    if args.rerun_changed:
        records.move_changed_aside(cells)
    records.refuse_changed(cells)
    estimates = [estimate(cell, study.budget_of(cell.method, cell.dataset), sets[cell.dataset].recipe) for cell in cells]
    for line in disk_problem(study, sets, cells, estimates):  # an estimate: what does not fit is refused when it is written
        logger.warning("%s", line)
    code = run_cells(cells, slots_of(args.jobs, args.gpus))
    return collect(study, say) if code == EXIT_OK and not args.cells else code


def chosen(cells: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """Cells by their names, all where none is named.

    Raises:
        BadInput: A name that no cell has.
    """
    by_name = {cell.name: cell for cell in cells}
    for name in names:
        if name not in by_name:
            raise BadInput(f"--cells {name}: the study has no such cell{nearest(name, by_name)}")
    return [by_name[name] for name in names] or list(cells)


def slots_of(jobs: int | None, gpus: str | None) -> list[dict[str, str]]:
    """What runs at a time: the environment of each.

    Raises:
        BadInput: No number of jobs, no numbers of GPUs, or both and they differ.
    """
    if jobs is not None and jobs < 1:
        raise BadInput(f"--jobs {jobs}: at least 1")
    if gpus is None:
        return [{} for _ in range(jobs or 1)]
    numbers = [word.strip() for word in gpus.split(",")]
    if not all(numbers) or len(set(numbers)) != len(numbers):
        raise BadInput(f"--gpus {gpus}: numbers of GPUs, each once, as 0,1,2,3")
    if jobs is not None and jobs > len(numbers):
        raise BadInput(f"--jobs {jobs} of {len(numbers)} GPUs: one cell has a GPU to itself: name more, or leave out --jobs")
    return [{"CUDA_VISIBLE_DEVICES": number} for number in numbers[: jobs or len(numbers)]]


def status(study: Study, say: Say) -> int:
    """Say how far every cell is."""
    states = {cell.name: records.state_of(cell) for cell in cells_of(study, labelled_sets(study))}
    counts = Counter(state.name for state in states.values())
    say(f"{study.name}: " + ", ".join(f"{counts[name]} {name}" for name in records.STATES if counts[name]))
    for name, state in states.items():
        if state.name != records.PENDING:
            say(f"{name}: {state.name}{': ' + state.reason if state.reason else ''}")
    return EXIT_OK
