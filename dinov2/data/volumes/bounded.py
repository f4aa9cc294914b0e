"""Foreign files: only regular ones are opened, and no more of them is read or expanded than they may hold.

Opening a pipe waits for a writer that may never come, a device has no end, and a few kilobytes of gzip expand to gigabytes.
"""

from __future__ import annotations

import bz2
import errno
import lzma
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO
from zipfile import BadZipFile

from nibabel.filebasedimages import ImageFileError
from nibabel.freesurfer.mghformat import MGHError
from nibabel.openers import Opener
from nibabel.spatialimages import HeaderDataError, HeaderTypeError, ImageDataError
from nibabel.wrapstruct import WrapStructError

from dinov2.errors import BadVolume, is_out_of_memory

MAX_TEXT_BYTES = 16 * 2**20  # of a sidecar, a data set's description, a header
MAX_TRAILING_BYTES = 16 * 2**20  # after the voxels of a compressed stream: MGH's tags, padding
_ADDRESS = re.compile(r"\(0x[0-9a-f]+\)")  # of the object that ITK speaks of, another one in each run
_CHUNK = 2**20
_PACKED_CHUNK = 2**16  # so that what is left of one, which zlib copies, is little
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_GZIP = b"\x1f\x8b"
_PACKED = (_GZIP, b"BZh", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, zstandard
_UNPACKING = (zlib.error, lzma.LZMAError, BadZipFile, struct.error, TokenError)  # the last: NumPy's, of a header
_NIBABEL = (ImageFileError, HeaderDataError, HeaderTypeError, ImageDataError, WrapStructError, MGHError)  # without a root
_ODD_VALUES = (ValueError, LookupError, ArithmeticError, TypeError, AttributeError)  # as a list where a header has a number
PARSERS_RAISE: tuple[type[Exception], ...] = (  # on bytes that they do not expect; RuntimeError: SimpleITK whatever it is
    *(OSError, EOFError, MemoryError, RuntimeError),
    *(*_ODD_VALUES, *_UNPACKING, *_NIBABEL),
)
_KINDS = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFDIR: "folder"}


class NotAFile(OSError):
    """A pipe, a socket, a device or a folder where a file is wanted; handled as what cannot be read."""


def check_regular(path: str | Path) -> os.stat_result:
    """The status of a file, links followed, before anything opens it.

    Raises:
        NotAFile: It is something else.
        OSError: It is not there.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise NotAFile(errno.EINVAL, f"is a {_KINDS.get(stat.S_IFMT(found.st_mode), 'special file')}, not a file", str(path))
    return found


def open_regular(path: str | Path) -> BinaryIO:
    """Open for reading what is a regular file; otherwise as `check_regular`."""
    check_regular(path)
    return open(path, "rb")


@contextmanager
def foreign(path: str, doing: str, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn what a library raises on a file that anyone may have written into a `BadVolume` that names it.

    Args:
        path: Named in the message.
        doing: As in "cannot be opened".
        also: What a library raises beside `PARSERS_RAISE`. What is in neither is raised as it is: an index sets such a file
            aside, because its process ends alone (`corpus/index/examine.died`).
    """
    try:
        yield
    except BadVolume:
        raise
    except FileNotFoundError as err:
        missing = "no such file" if err.filename in (None, path) else f"its file {err.filename} is not there"
        raise BadVolume(f"{path}: {missing}", "missing") from err
    except PermissionError as err:
        raise BadVolume(f"{path}: permission denied", "permission") from err
    except NotAFile as err:
        named = "" if err.filename == path else f"{err.filename} "
        raise BadVolume(f"{path}: {named}{err.strerror}", "not_a_file") from err
    except (*PARSERS_RAISE, *also) as err:
        if "CRC" in str(err):  # the gzip module's words, and the zipfile module's
            raise BadVolume(f"{path}: damaged: its gzip checksum does not match", "damaged") from err
        reason = "truncated" if isinstance(err, EOFError) else "memory" if is_out_of_memory(err) else "unreadable"
        raise BadVolume(f"{path}: cannot be {doing}: {describe_error(err)}", reason) from err


def describe_error(err: Exception) -> str:
    """One line, with the kind of the error where its text alone would say nothing, as of a KeyError."""
    if isinstance(err, MemoryError):
        return "it takes more memory than there is"
    lines = str(err).rpartition("ERROR: ")[2].splitlines() or [""]  # before it SimpleITK says where it was built
    text = _ADDRESS.sub("", lines[-1 if lines[0].endswith(":") else 0])
    speaks = text and isinstance(err, (OSError, EOFError, ValueError, RuntimeError)) and not isinstance(err, RecursionError)
    return text if speaks else f"{type(err).__name__} {text}".rstrip()


def is_packed(path: str | Path) -> bool:
    """Whether a file is compressed as a whole, by its first bytes."""
    with open_regular(path) as file:
        return file.read(4).startswith(_PACKED)


def expanded(path: str | Path, limit: int, start: int = 0, is_raw: bool = False) -> Iterator[bytes]:
    """What a compressed file expands to, piece by piece, read to its end so that every checksum in it was compared.

    Args:
        path: gzip (of any number of members), zlib, bzip2 or zstandard.
        limit: Bytes that it may expand to.
        start: Where in the file the stream begins.
        is_raw: A stream of deflate by itself, as DICOM has it, without a checksum.

    Raises:
        BadVolume: Its checksum does not match, it cannot be decoded, ends early, or expands further.
    """
    total = 0
    for piece in _pieces(path, start, is_raw):
        total += len(piece)
        if total > limit:
            raise BadVolume(
                f"{path}: its compressed data expand to more than the {limit:,} bytes that its header needs", "damaged"
            )
        yield piece


def check_expansion(path: str | Path, limit: int, start: int = 0, is_raw: bool = False) -> None:
    """Read a compressed file to its end; see `expanded`."""
    for _ in expanded(path, limit, start, is_raw):
        pass


def _pieces(path: str | Path, start: int, is_raw: bool) -> Iterator[bytes]:
    with open_regular(path) as file:
        file.seek(start)
        mark = file.read(4)
        file.seek(start)
        if start == 0 and mark.startswith(_PACKED[1:]):
            yield from _by_library(path, mark)
            return
        try:
            yield from _inflated(file, -zlib.MAX_WBITS if is_raw else _GZIP_OR_ZLIB)
        except zlib.error as err:
            what = (
                "its gzip checksum does not match"
                if "check" in str(err)
                else f"its compressed stream cannot be decoded ({err})"
            )
            raise BadVolume(f"{path}: damaged: {what}", "damaged") from err
        except EOFError as err:
            raise BadVolume(f"{path}: cannot be read: truncated, {err}", "truncated") from err


def _inflated(file: BinaryIO, window: int) -> Iterator[bytes]:
    """zlib compares checksum and length where a member ends. What follows the last one and is none is not read, as by gzip."""
    packed = file.read(_PACKED_CHUNK)
    while packed:
        member = zlib.decompressobj(window)
        while not member.eof:
            piece = member.decompress(packed, _CHUNK)
            if not (packed or piece or member.eof):
                raise EOFError("its compressed stream ends before its end mark")
            packed = member.unused_data if member.eof else member.unconsumed_tail or file.read(_PACKED_CHUNK)
            yield piece
        while not packed.strip(b"\0") and (more := file.read(_PACKED_CHUNK)):  # padded with zeros
            packed = more
        packed = packed.lstrip(b"\0")
        if len(packed) == 1:
            packed += file.read(_PACKED_CHUNK)
        if not packed.startswith(_GZIP):
            return


def _by_library(path: str | Path, mark: bytes) -> Iterator[bytes]:
    try:
        with bz2.open(path) if mark.startswith(b"BZh") else Opener(str(path)) as file:
            while piece := file.read(_CHUNK):
                yield piece
    except EOFError as err:
        raise BadVolume(f"{path}: cannot be read: truncated, its compressed stream ends early", "truncated") from err
    except (OSError, ValueError) as err:
        raise BadVolume(f"{path}: damaged: its compressed stream cannot be decoded ({err})", "damaged") from err
