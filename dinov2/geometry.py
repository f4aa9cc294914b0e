"""Numbers along the three axes of a volume, and the two ends of a range: names of their types, and how one is made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

Size3 = tuple[int, int, int]  # voxels, cells or patches
Spacing = tuple[float, float, float]  # mm
Range = tuple[float, float]
Edges = int | Size3  # of a box: one number for a cube


def triple(values: Iterable[T]) -> tuple[T, T, T]:
    """Three values as a tuple that the type checker knows the length of.

    Raises:
        ValueError: There are fewer or more.
    """
    one, two, three = values
    return one, two, three


def pair(values: Iterable[T]) -> tuple[T, T]:
    """As `triple`, of two values.

    Raises:
        ValueError: There are fewer or more.
    """
    one, two = values
    return one, two


def edges(size: Edges) -> Size3:
    """Edges of a box along the three axes."""
    return (size, size, size) if isinstance(size, int) else size


def not_whole(image_size: int, step: int, what: str) -> str:
    """What is wrong with an input's edge (voxels) that is no multiple of a patch, or of what stands for it; else empty."""
    if image_size % step == 0:
        return ""
    nearest = sorted({max(step, image_size // step * step), -(-image_size // step) * step})
    return f"--image-size {image_size} is no multiple of {what} {step}: use {nearest}"
