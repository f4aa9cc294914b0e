"""Users' files: text, JSON and paths read or refused by name, paths as lists have them, files written whole, locks."""

from __future__ import annotations

import codecs
import fcntl
import json
import math
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dinov2.errors import BadInput

TEMPORARY = ".tmp."  # prefix of the names that a killed process may leave; the ending stays, because writers choose by it
MOST_NAME_BYTES = 235  # of a file's name, 255 less what its temporary name adds
MOST_TEXT_BYTES = 2**31  # a list of some million volumes
MOST_FACTS_BYTES = 2**24  # a file that describes a scan or a data set
PATIENCE = 10.0  # seconds; see lock
_MOST_DIGITS = 300  # a whole number beyond is none that anything counts, and no float holds it


def words(argv: Sequence[str] | None) -> list[str]:
    """The words of a command line, `~` expanded in those that are paths: `~/x`, `--flag=~/x`, `key=~/x`.

    Args:
        argv: None: this process's own.

    Raises:
        BadInput: A word that is not in UTF-8.
    """
    expanded = []
    for word in sys.argv[1:] if argv is None else argv:
        name, equals, value = word.partition("=")
        is_pair = equals and "/" not in name
        expanded.append(f"{name}={user_path(value)}" if is_pair else user_path(word))
    return expanded


def user_path(given: str | Path) -> str:
    """A path as a user gives it, `~` expanded.

    Raises:
        BadInput: Its name is not in UTF-8, or has a zero in it.
    """
    path = os.path.expanduser(given)
    if not is_utf8(path) or "\0" in path:
        raise BadInput(f"{shown(path)}: a name that is not in UTF-8: rename it")
    return path


def is_utf8(name: str) -> bool:
    """Whether a file's name is text: what it is not, tables, JSON and several readers cannot hold."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def shown(path: str | Path) -> str:
    """A path for the terminal, whatever bytes its name has."""
    return str(path).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def read_text(
    path: str | Path, name: str = "", advice: str = "", most_bytes: int = MOST_TEXT_BYTES, remedy: str = "save it as UTF-8"
) -> str:
    """The text of a user's file: UTF-8, with a byte order mark or without; line ends as they are.

    Args:
        path: A regular file, or a link to one; `~` is expanded.
        name: How messages call it; default: its path.
        advice: What to do where it is not there.
        most_bytes: A larger file is refused.
        remedy: What to do where it is no UTF-8.

    Raises:
        BadInput: It cannot be read, or is no such text.
    """
    path = user_path(path)
    name = name or path
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # a pipe does not block
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadInput(f"{name}: no regular file, but a pipe or a device: give a file")
            data = file.read(most_bytes + 1)
    except OSError as err:
        raise BadInput(f"{name}: {err.strerror}" + (f": {advice}" if advice else "")) from err
    if len(data) > most_bytes:
        raise BadInput(f"{name}: longer than the {most_bytes >> 20} MiB that such a file may have: give another")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadInput(f"{name}: is in UTF-16: {remedy}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = 1 + data.count(b"\n", 0, err.start)
        raise BadInput(
            f"{name}: is not in UTF-8 (byte {data[err.start]:#04x} in line {line}), perhaps in Latin-1: {remedy}"
        ) from err
    if "\0" in text:
        raise BadInput(f"{name}: is no text, or in UTF-16: {remedy}")
    return text


def read_json(
    path: str | Path,
    name: str = "",
    advice: str = "",
    most_bytes: int = MOST_TEXT_BYTES,
    remedy: str = "",
) -> Any:
    """The content of a user's JSON file; arguments as of `read_text`, and what to do where it is no JSON.

    Raises:
        BadInput: As of `read_text`, or no JSON that can be used.
    """
    text = read_text(path, name, advice, most_bytes, remedy or "save it as UTF-8")
    try:
        return from_json(text)
    except ValueError as err:
        what = "is not valid JSON, perhaps half-written"
        raise BadInput(f"{name or path} {what}: {err}: {remedy or 'correct it or make it again'}") from err


def from_json(text: str | bytes) -> Any:
    """JSON, whoever wrote it.

    Raises:
        ValueError: It is none, is nested too deeply, or has a number of hundreds of digits.
    """
    try:
        return json.loads(text, parse_int=_whole_number)
    except RecursionError as err:
        raise ValueError("nested too deeply") from err


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole_number(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def refuse_output(path: str | Path, name: str = "") -> None:
    """Refuse a name under which no file can be written: none at all, a folder's, a device's, one that is too long.

    Args:
        path: Of the file to be written; an earlier regular file is fine.
        name: The flag that gave it.

    Raises:
        BadInput: There is something to refuse.
    """
    path = Path(user_path(path))
    reason = "its name is too long" if len(os.fsencode(path.name)) > MOST_NAME_BYTES else ""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            reason = "is a folder" if stat.S_ISDIR(mode) else "is no regular file, but a device or a pipe"
    except FileNotFoundError:
        pass
    except OSError as err:
        reason = err.strerror or type(err).__name__
    if reason:
        raise BadInput(f"{name} {path}: {reason}: give the name of a file to write".strip())


@contextmanager
def replacing(path: Path, private: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it becomes `path` when the block ends, and goes when the block fails.

    Args:
        path: What is to be written; an earlier file is replaced at once, never half.
        private: The temporary name is this process's own, for files that several may write at the same time.

    Raises:
        BadInput: As of `refuse_output`.
    """
    refuse_output(path)
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
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # a reader never meets half a letter


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


def lock(file: IO[Any], patience: float = PATIENCE) -> bool:
    """Take an open file for this process and those it will start alone; the lock goes with them, however they end.

    Args:
        file: Open for writing.
        patience: Seconds to wait where another process has it: what a killed run has started ends a moment after it, on a busy
            machine some seconds, and holds on to what it inherited until then.

    Returns:
        Whether it is ours.
    """
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        else:
            return True


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
    """The absolute path of a file that a list in a folder names; `..` is the parent of the folder, not of a link to it.

    Raises:
        BadInput: As of `user_path`.
    """
    given = user_path(given)
    start = os.path.realpath(folder) if _goes_up(given) else os.path.abspath(folder)
    return os.path.normpath(os.path.join(start, given))


def _goes_up(path: str) -> bool:
    return path.split(os.sep, 1)[0] == os.pardir
