"""Files that are whole or not there: written to a temporary name and renamed. JSON that every reader takes. Paths in lists."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dinov2.errors import BadInput

TEMPORARY = ".tmp."  # prefix of the names that a killed process may leave; the ending stays, because writers choose by it


@contextmanager
def replacing(path: Path, private: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it becomes `path` when the block ends, and goes when the block fails.

    Args:
        path: What is to be written; an earlier file is replaced at once, never half.
        private: The temporary name is this process's own, for files that several may write at the same time.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}.{path.name}" if private else f"{TEMPORARY}{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full disk or a lost folder raises into one line.

    Raises:
        BadInput: Something could not be written.
    """
    try:
        yield
    except OSError as err:
        raise cannot_write(path, err) from err


def cannot_write(path: Path, err: OSError) -> BadInput:
    """The line about a file of a run that could not be written."""
    return BadInput(
        f"{path}: cannot be written ({err.strerror or err}): make room or choose another --output-dir; "
        "the last complete checkpoint is intact"
    )


def write_text(path: Path, text: str) -> None:
    """Write a small file in UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all; see `to_json`."""
    write_text(path, to_json(content, indent=1) + "\n")


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON of plain values; a number that is not finite becomes null, since JSON has none."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content


def path_for_list(path: str | Path, folder: str | Path) -> str:
    """How a list in a folder names a file: relative to the folder, through `..` too, so that list and data can move together.

    Absolute where the two share no folder but the root, and where `..` would lead elsewhere because a folder on the way is a
    symbolic link.
    """
    absolute, start = os.path.abspath(path), os.path.abspath(folder)
    if os.path.commonpath([absolute, start]) == os.sep:
        return absolute
    relative = os.path.relpath(absolute, start)
    if _goes_up(relative) and os.path.realpath(os.path.join(start, relative)) != os.path.realpath(absolute):
        return absolute
    return relative


def path_in_list(given: str, folder: str | Path) -> str:
    """The absolute path of a file that a list in a folder names; `..` is the parent of the folder, not of a link to it."""
    start = os.path.realpath(folder) if _goes_up(given) else os.path.abspath(folder)
    return os.path.normpath(os.path.join(start, given))


def _goes_up(path: str) -> bool:
    return path.split(os.sep, 1)[0] == os.pardir
