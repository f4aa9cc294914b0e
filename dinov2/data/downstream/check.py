"""`dinov2 recipe check`: three cases of a downstream dataset, loaded, counted and drawn, before hours are spent on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from dinov2.data.downstream.cases import Case, check_headers, prepare_case
from dinov2.data.downstream.crops import BACKGROUND
from dinov2.data.downstream.lists import Item, read_downstream_datalist
from dinov2.data.downstream.recipes import Recipe, load_recipe
from dinov2.errors import EXIT_OK, BadInput
from dinov2.logging import Say
from dinov2.optional import require

CLIPPED = 0.5  # share of the foreground at either end of the range above which the intensities look wrong
OUTSIDE = 0.1  # share of the labelled voxels in the background above which image and label look apart
ANISOTROPY = 4.0  # coarsest spacing over finest above which a cube of voxels is a flat box of tissue
SMALL = 32  # voxels along an axis below which crops are mostly padding


@dataclass(frozen=True)
class Findings:
    """What one case looks like.

    Attributes:
        lines: For the user.
        warnings: What looks wrong with it alone.
        shares: Share of the voxels of each output.
    """

    lines: list[str]
    warnings: list[str]
    shares: dict[str, float]


def check_recipe(name_or_path: str | Path, base_data_dir: Path, output_dir: Path, say: Say) -> int:
    """Read the list, hold all headers against each other, load and draw the first case of each part.

    Args:
        name_or_path: The recipe.
        base_data_dir: Folder of its datalist.
        output_dir: A PNG for each case goes here.
        say: Takes each line.

    Returns:
        The exit code, 0 with warnings too.

    Raises:
        BadInput: The recipe, the list or a case cannot be used.
    """
    require("dinov2 recipe check", "matplotlib")
    recipe = load_recipe(name_or_path)
    parts = read_downstream_datalist(base_data_dir, recipe)
    items = [item for part in parts.values() for item in part]
    check_headers(items, recipe)
    counts = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
    say(
        f"{recipe.name}: {counts}; all {len(items)} headers fit; {recipe.num_outputs} outputs: {', '.join(recipe.output_names)}"
    )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise BadInput(f"--output-dir {output_dir}: {err.strerror}: choose another folder") from err
    found = []
    for item in _sample(parts):
        case = prepare_case(item, recipe)
        found.append(describe_case(case, recipe))
        picture = output_dir / f"{case.name.replace(os.sep, '_')}.png"
        draw_prepared(case, recipe, picture)
        for line in (*found[-1].lines, f"  drawn: {picture}"):
            say(line)
    warnings = [w for findings in found for w in findings.warnings]
    warnings += _never_present([findings.shares for findings in found])
    for warning in warnings:
        say(f"warning: {warning}")
    say(f"{len(warnings)} warnings from {len(found)} cases")
    return EXIT_OK


def _sample(parts: dict[str, list[Item]]) -> list[Item]:
    """The first case of each part."""
    return [part[0] for part in parts.values()]


def describe_case(case: Case, recipe: Recipe) -> Findings:
    """Shape, spacing, intensities and labels of a case, and what looks wrong with them."""
    shape, spacing = tuple(case.image.shape[1:]), case.spacing_mm
    size = f"{' x '.join(map(str, shape))} voxels of {' x '.join(f'{s:.3g}' for s in spacing)} mm"
    stored = " x ".join(f"{s:.3g}" for s in np.linalg.norm(case.grid.stored_affine[:3, :3], axis=0))
    lines, warnings = [f"{case.name}: {size} (stored: {' x '.join(map(str, case.grid.stored_shape))} of {stored} mm)"], []
    if max(spacing) > ANISOTROPY * min(spacing):
        warnings.append(f"{case.name}: spacing {max(spacing):.3g} mm against {min(spacing):.3g} mm: set space.spacing_mm")
    if min(shape) < SMALL:
        warnings.append(f"{case.name}: {min(shape)} voxels along an axis: much of a larger crop is padding")
    for c, channel in enumerate(case.image):
        low, high = float((channel <= -1).float().mean()), float((channel >= 1).float().mean())
        middle = float(channel.median())
        lines.append(f"  channel {c + 1}: median {middle:+.2f}, {low:.1%} at -1, {high:.1%} at 1")
        if high > CLIPPED or low > 1 - 1e-3:
            warnings.append(
                f"{case.name}: channel {c + 1} is almost all clipped ({low:.1%} at -1, {high:.1%} at 1): see intensity"
            )
    shares = {}
    if case.label is not None:
        masks = recipe.masks(case.label)
        shares = {n: float(mask.float().mean()) for n, mask in zip(recipe.output_names, masks, strict=True)}
        lines.append("  voxels: " + ", ".join(f"{name} {share:.2%}" for name, share in shares.items()))
        warnings += _label_warnings(case, case.label)
    return Findings(lines, warnings, shares)


def _label_warnings(case: Case, label: Tensor) -> list[str]:
    labelled = label[0] > 0
    if not labelled.any():
        return [f"{case.name}: nothing is labelled"]
    outside = float((case.image == BACKGROUND).all(0)[labelled].float().mean())
    if outside > OUTSIDE:
        return [f"{case.name}: {outside:.0%} of the labelled voxels are at the lowest intensity: do image and label fit?"]
    return []


def _never_present(shares: Sequence[dict[str, float]]) -> list[str]:
    names = shares[0] if shares else []
    return [
        f"{name} is in none of the {len(shares)} cases: see classes or regions"
        for name in names
        if not any(s[name] for s in shares)
    ]


def draw_prepared(case: Case, recipe: Recipe, path: Path, title: str = "", beside: Case | None = None) -> None:
    """A prepared case with the outlines of its label map, if it has one, named by the recipe.

    Args:
        case: A case, or a prediction in the label's place.
        recipe: Names the classes.
        path: PNG.
        title: Above it.
        beside: The same case with another label map, through whose planes this one is drawn.
    """
    from dinov2.visual.cases import busiest, draw_case  # here: numbers need no matplotlib

    masks = _masks(case, recipe)
    centre = busiest(list(_masks(beside, recipe).values()), tuple(case.image.shape[1:])) if beside is not None else None
    draw_case(case.image.numpy(), masks, case.spacing_mm, path, title, centre)


def _masks(case: Case, recipe: Recipe) -> dict[str, np.ndarray]:
    """[H, W, D] bool by the names of what is drawn: all but the background."""
    if case.label is None:
        return {}
    names = recipe.output_names if recipe.overlapping else recipe.output_names[1:]
    return dict(zip(names, recipe.masks(case.label)[-len(names) :].numpy(), strict=True))
