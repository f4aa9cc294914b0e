"""PCA of one volume by the teachers that a pretraining kept, each with its own components in the colours of the last one."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov2.checkpointer.teacher import TEACHER_FILE
from dinov2.data.datalist import Datalist, Entry
from dinov2.errors import BadInput, BadVolume
from dinov2.eval.visualize import Request, Shown, Tokens, colours_inside, joint_basis, open_shown, tokens_of
from dinov2.features.encoder import Encoder, load_encoder
from dinov2.features.pca import PatchBasis, turned_to
from dinov2.visual.features import Panel, draw_panels, grey_levels
from dinov2.visual.figure_page import Chapter, Picture

MOST_CHECKPOINTS = 4
MOST_TRIED = 5  # volumes of a list, where the first ones cannot be used
OVERLAP = 0.25  # of windows: a third of the work of `dinov2 visualize`
_ONE_CELL = np.ones((1, 1, 1), np.float32)


class Seen(NamedTuple):
    """What a teacher makes of the volume."""

    iteration: int
    shown: Shown
    tokens: Tokens
    basis: PatchBasis


def checkpoint_chapter(folder: Path, datalist: Datalist | None, scan: Path | None) -> Chapter:
    """The volume, and its patches in colours at each of a few checkpoints.

    Args:
        folder: Of the run.
        datalist: Its list; None where it is not there any more.
        scan: The volume; None: the first one of the list that can be used.

    Raises:
        BadInput: `scan` cannot be used.
    """
    chapter = Chapter("Features of one volume")
    found = teachers(folder)
    if not found:
        chapter.lines.append("No teacher has been kept yet (eval/training_*/teacher_checkpoint.pth).")
        return chapter
    entries = [Entry(str(scan), ())] if scan is not None else [] if datalist is None else datalist.entries[:MOST_TRIED]
    seen, problems, licence = look_at(spread(found), entries, scan is not None)
    chapter.lines.extend(problems)
    if not seen:
        chapter.lines.append("Not drawn: no volume of the list could be used; give one with --scan.")
        return chapter
    last = seen[-1]
    own = ": each has its own components, turned so that its colours match those of the last" if len(seen) > 1 else ""
    chapter.lines.append(
        f"PCA of patch tokens by {len(seen)} of {len(found)} kept teachers{own}. The first component is the foreground, the "
        f"next three are the colours; three planes in millimetre aspect. {last.shown.scan.name}: "
        f"{'given with --scan' if scan is not None else 'a volume that was trained on'}."
    )
    chapter.lines.append(f"Licence of the weights: {licence or 'not said'}.")
    chapter.pictures.append(Picture(draw(seen), "The scan, and below it the teachers by their iteration."))
    return chapter


def teachers(folder: Path) -> list[tuple[int, Path]]:
    """The kept teachers with their iterations, in order."""
    named = (
        (re.fullmatch(r"training_(\d+)", path.parent.name), path) for path in folder.glob(f"eval/training_*/{TEACHER_FILE}")
    )
    return sorted((int(match[1]), path) for match, path in named if match)


def spread(found: Sequence[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """At most `MOST_CHECKPOINTS`, the first and the last among them."""
    places = np.linspace(0, len(found) - 1, min(MOST_CHECKPOINTS, len(found))).round().astype(int)
    return [found[i] for i in places]


def look_at(
    chosen: Sequence[tuple[int, Path]], entries: Sequence[Entry], is_given: bool
) -> tuple[list[Seen], list[str], str | None]:
    """What each teacher makes of the first volume that can be used.

    Returns:
        What there is to see, what is to be said of volumes and teachers that show nothing, and the licence of the weights.

    Raises:
        BadInput: The volume was given, and cannot be used.
    """
    problems: list[str] = []
    try:
        newest = load_encoder(chosen[-1][1], "cpu")
    except BadInput as err:
        return [], [f"{err}."], None
    for entry in entries:
        request = Request(((Path(entry.image),),), "pca", Path(), overlap=OVERLAP, axes=entry.axes)
        try:
            open_shown(0, request, newest)
        except (BadInput, BadVolume) as err:
            if is_given:
                raise BadInput(f"--scan {entry.image}: {err}") from err
            problems.append(f"{err}.")
            continue
        return list(_all_of(chosen, request, newest, problems)), problems, newest.licence
    return [], problems, newest.licence


def _all_of(chosen: Sequence[tuple[int, Path]], request: Request, newest: Encoder, problems: list[str]) -> Iterator[Seen]:
    """Teachers one after the other; one that shows nothing is added to `problems`."""
    for iteration, path in chosen:
        try:
            encoder = newest if path == chosen[-1][1] else load_encoder(path, "cpu")
            shown = open_shown(0, request, encoder)
            tokens = tokens_of(shown, encoder, None)
            yield Seen(iteration, shown, tokens, joint_basis([shown], [tokens]))
        except BadInput as err:
            problems.append(f"Iteration {iteration:,}: {err}.")


def draw(seen: Sequence[Seen]) -> bytes:
    """PNG: the scan, then a block for each teacher."""
    last, panels = seen[-1], []
    for one in seen:
        basis = one.basis if one is last else turned_to(one.basis, one.tokens.patch, last.basis, last.tokens.patch)
        scores = one.shown.placed(basis.scores(one.tokens.patch), one.tokens.affine, smooth=True)  # [X, Y, Z, 4]
        rgb, _ = colours_inside(basis, scores, one.shown.placed(_ONE_CELL, one.shown.scan.affine, smooth=False))
        panels.append(Panel(f"iteration {one.iteration:,}", rgb))
    shown = last.shown
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pca.png"
        draw_panels(grey_levels(shown.image), panels, shown.affine, shown.middle_mm, path, columns=1)
        return path.read_bytes()
