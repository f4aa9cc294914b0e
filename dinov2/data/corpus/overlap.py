"""Scans and patients that two lists share; the list of hashes that travels with weights, and the warning it allows.

Scans are told by the hash of their voxels, which `dinov2 index` writes (`sha`); where a list has none, the file is read for it.
Patients are told by data set and id (or its hash: lists to be compared need the same salt).
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2.data.corpus.index.examine import content_sha
from dinov2.data.datalist import Entry, read_datalist
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, BadInput, BadVolume
from dinov2.logging import Say
from dinov2.logging.progress import track

if TYPE_CHECKING:  # weights bring torch, which comparing two lists can do without
    from dinov2.checkpointer.teacher import Teacher

logger = logging.getLogger(__name__)

TRAINED_ON = "trained_on"  # of a checkpoint's meta
SHA_CHARS = 16  # 64 bits of each: a chance match among 100,000 and 10,000 scans has odds of 1 in 10^10
_SHOWN = 10


@dataclass(frozen=True)
class Seen:
    """What identifies the scans of a list.

    Attributes:
        scans: First characters of the content hashes.
        patients: Hashes of "<data set>/<id>", so that weights carry no name of a folder.
        num_unknown: Volumes that nothing is known of.
    """

    scans: frozenset[str]
    patients: frozenset[str]
    num_unknown: int = 0

    def __or__(self, other: Seen) -> Seen:
        return Seen(self.scans | other.scans, self.patients | other.patients, self.num_unknown + other.num_unknown)

    def as_meta(self) -> dict[str, Any]:
        """Plain types, as a checkpoint keeps it."""
        return {"scans": sorted(self.scans), "patients": sorted(self.patients), "num_unknown": self.num_unknown}


@dataclass(frozen=True)
class Shared:
    """Entries of a list that were seen elsewhere.

    Attributes:
        scans: Their content was.
        patients: Their patient was, in another scan.
        num_unknown: Entries whose content is not known.
    """

    scans: list[Entry]
    patients: list[Entry]
    num_unknown: int

    def __bool__(self) -> bool:
        return bool(self.scans or self.patients)


def seen_in(entries: list[Entry]) -> Seen:
    """From what a list says; no file is read."""
    scans = [e.extra["sha"][:SHA_CHARS] for e in entries if e.extra.get("sha")]
    patients = frozenset(p for p in map(patient_key, entries) if p)
    return Seen(frozenset(scans), patients, len(entries) - len(scans))


def patient_key(entry: Entry) -> str | None:
    """None where the list does not say; the same id in two data sets is two people."""
    patient = entry.extra.get("patient")
    return None if patient is None else _hashed(f"{entry.extra.get('dataset', '')}/{patient}".lower())


def _hashed(key: str) -> str:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def with_hashes(entries: list[Entry]) -> list[Entry]:
    """The entries with their content's hash; a file without one is read, and one that cannot be is said."""
    for entry in track([e for e in entries if not e.extra.get("sha")], "scans read to be compared"):
        try:
            entry.extra["sha"] = content_sha(entry)
        except BadVolume as err:
            logger.warning("its content is not compared: %s", err)
    return entries


def shared_with(entries: list[Entry], seen: Seen) -> Shared:
    """Which entries were seen, by content or by patient."""
    entries = with_hashes(entries)
    scans = [e for e in entries if e.extra.get("sha", "")[:SHA_CHARS] in seen.scans]
    same = {id(e) for e in scans}
    patients = [e for e in entries if patient_key(e) in seen.patients and id(e) not in same]
    return Shared(scans, patients, sum(not e.extra.get("sha") for e in entries))


def seen_by_weights(weights: Teacher | str | Path) -> Seen | None:
    """The hashes that weights carry; None where they carry none.

    Raises:
        BadInput: They cannot be read.
    """
    from dinov2.checkpointer.teacher import read_meta

    meta = read_meta(weights) if isinstance(weights, (str, Path)) else weights.meta
    found = meta.get(TRAINED_ON)
    if found is None:
        return None
    patients = (_hashed(p) if "/" in p else p for p in found["patients"])  # weights of an earlier version have them plain
    return Seen(frozenset(found["scans"]), frozenset(patients), found["num_unknown"])


def warn_of_listed(listed: list[Entry], pretraining: list[Entry], what: str) -> None:
    """Warn where scans are among those of a pretraining list, by file or by content.

    Files are read only where that list has hashes.

    Args:
        listed: Scans that say how good a network is.
        pretraining: Those that it learns from.
        what: Names `listed`.
    """
    trained, seen = {os.path.realpath(e.image) for e in pretraining}, seen_in(pretraining)
    shared = [e for e in listed if os.path.realpath(e.image) in trained]
    if seen.scans:
        rest = [e for e in listed if os.path.realpath(e.image) not in trained]
        shared += shared_with(rest, seen).scans
    if shared:
        names = ", ".join(Path(e.image).name for e in shared[:3])
        logger.warning(
            "%s: %d of its %d scans are in the pretraining list too (%s, ...)", what, len(shared), len(listed), names
        )


def warn_of_overlap(test: list[Entry], weights: Teacher | str | Path) -> Shared | None:
    """Warn where test scans, or other scans of their patients, were pretrained on; what evaluations call before they start.

    Args:
        test: The scans that will be scored; without a hash in their list they are read for it.
        weights: Those that are evaluated, opened or as of `open_teacher`.

    Returns:
        What is shared; None where the weights do not say what they saw.

    Raises:
        BadInput: The weights cannot be read.
    """
    seen, name = seen_by_weights(weights), weights if isinstance(weights, (str, Path)) else weights.source
    if seen is None:
        logger.warning("%s does not say what it was trained on: whether the test scans were among it is not known", name)
        return None
    shared = shared_with(test, seen)
    if shared.scans:
        names = ", ".join(Path(e.image).name for e in shared.scans[:3])
        logger.warning("%d of %d test scans were pretrained on (%s, ...)", len(shared.scans), len(test), names)
    if shared.patients:
        logger.warning("%d test scans are of patients of whom other scans were pretrained on", len(shared.patients))
    if seen.num_unknown:
        logger.warning("%s was also trained on %d volumes without a content hash", name, seen.num_unknown)
    return shared


def _names_weights(second: Path) -> bool:
    if second.suffix == ".json":
        return False
    from dinov2.checkpointer.teacher import names_weights

    return names_weights(second)


def overlap(first: Path, second: Path, say: Say) -> int:
    """Compare a list with another or with weights.

    Returns:
        0 where nothing is shared, else 2.

    Raises:
        BadInput: One cannot be read, or the weights carry no hashes.
    """
    entries = read_datalist(first).entries
    if _names_weights(second):
        seen = seen_by_weights(second)
        if seen is None:
            raise BadInput(f"{second}: does not say what it was trained on: compare with the list it was trained on")
    else:
        seen = seen_in(with_hashes(read_datalist(second).entries))
    shared = shared_with(entries, seen)
    for what, found in (("scan", shared.scans), ("patient", shared.patients)):
        for entry in found[:_SHOWN]:
            say(f"same {what}: {entry.image}".encode("utf-8", "backslashreplace").decode())
        if len(found) > _SHOWN:
            say(f"same {what}: ... and {len(found) - _SHOWN} more")
    unknown = shared.num_unknown + seen.num_unknown
    scans = f"{len(shared.scans)} of {len(entries)} volumes of {first} are in {second}"
    say(f"{scans}, {len(shared.patients)} more are of patients in it; {unknown} could not be compared")
    if seen.patients and not shared.patients and any(patient_key(e) for e in entries):
        say("patients of lists that were indexed with different salts cannot be compared: use one --id-salt (docs/datasets.md)")
    return EXIT_BAD_INPUT if shared else EXIT_OK
