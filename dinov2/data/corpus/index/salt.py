"""The secret that patients' ids are hashed with: made once for the lists of a folder, kept beside them, never in them.

Seven-digit numbers are found back from plain hashes in a second. With a salt of 128 bits they are not, as long as the salt does
not travel with the list.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from dinov2.errors import BadInput
from dinov2.files import read_text

FILE = "patients.salt"
_MOST_BYTES = 4096


def salt_path(output: Path) -> Path:
    """Where a list's salt is: in its folder, for all lists and shards there; of `LIST.shards` in the folder above."""
    folder = output.absolute().parent
    return (folder.parent if folder.suffix == ".shards" else folder) / FILE


def kept_salt(path: Path) -> str:
    """The salt of a file, which is made, for its owner alone, where it is not there; of several processes one makes it.

    Raises:
        BadInput: It cannot be read or made.
    """
    if not os.path.lexists(path):
        write_salt(path, secrets.token_hex(16))
    salt = read_text(path, most_bytes=_MOST_BYTES).strip()
    if not salt:
        raise BadInput(f"{path}: is empty: remove it, which gives all patients new hashes, or give --id-salt")
    return salt


def write_salt(path: Path, salt: str) -> None:
    """Keep a salt, readable by its owner alone; one that another process has just kept stays.

    Raises:
        BadInput: It cannot be written.
    """
    temporary = path.with_name(f".tmp.{secrets.token_hex(4)}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(salt + "\n")
        try:
            os.link(temporary, path)  # whole, and never in place of another
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    except OSError as err:
        raise BadInput(f"{path}: {err.strerror}: choose another --output, or give --id-salt") from err


def mark_of(salt: str) -> str:
    """What a journal keeps of a salt: enough to tell it from another."""
    return hashlib.blake2b(salt.encode(), digest_size=4).hexdigest() if salt else ""
