"""`dinov2 index`: folders to a datalist and a quarantine, by several processes, continued after a stop, in shards or whole."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dinov2.data.corpus.index.examine import ExamineOptions, Row, died, examine
from dinov2.data.corpus.index.journal import Journal, journal_path, read_journal
from dinov2.data.corpus.index.quality import Limits, judge, parted_series
from dinov2.data.corpus.index.salt import FILE, kept_salt, mark_of, salt_path, write_salt
from dinov2.data.corpus.index.walk import Unit, walk
from dinov2.data.datalist import write_datalist
from dinov2.data.pool import unordered
from dinov2.data.volumes.formats import FORMAT_NAMES
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_RESUMABLE, BadInput
from dinov2.files import refuse_output, shown, to_json, user_path, write_text
from dinov2.logging import Say
from dinov2.logging.progress import Progress
from dinov2.signals import stop_requests

logger = logging.getLogger(__name__)

UNITS_PER_BATCH = 8  # handed to a process at a time


@dataclass(frozen=True)
class IndexRequest:
    """What is asked for.

    Attributes:
        output: The datalist to write; the journal lies beside it.
        quarantine: Where to write what was set aside; None: beside the list, as `<list>.quarantine.json`.
        limits: Of what is listed.
        examine: How files are read.
        shard: (which, of how many), from 1; (1, 1) is everything.
        num_workers: Processes; 0: this one, which a file that ends it ends.
    """

    output: Path
    quarantine: Path | None = None
    limits: Limits = field(default_factory=Limits)
    examine: ExamineOptions = field(default_factory=ExamineOptions)
    shard: tuple[int, int] = (1, 1)
    num_workers: int = 0

    @property
    def quarantine_path(self) -> Path:
        return self.quarantine or self.output.with_name(self.output.name.removesuffix(".json") + ".quarantine.json")

    def salted(self) -> IndexRequest:
        """With the list's own salt, where ids are hashed and none is given.

        Raises:
            BadInput: It cannot be read or made.
        """
        if self.examine.keep_ids or self.examine.id_salt:
            return self
        salt = kept_salt(salt_path(self.output))
        return replace(self, examine=replace(self.examine, id_salt=salt))

    def row_options(self) -> dict[str, Any]:
        """What rows depend on, as a journal keeps it: no secret word in it."""
        options = asdict(self.examine)
        pattern, salt = options.pop("pattern"), options.pop("id_salt")
        spacing = options.pop("spacing_mm")
        return {
            **options,
            "spacing_mm": spacing and list(spacing),
            "pattern": pattern.pattern if pattern else None,
            "id_salt": mark_of(salt),
        }


def refuse_outputs(request: IndexRequest, report: Path | None = None) -> None:
    """Refuse what cannot be written, or would be written twice, before a file is read.

    Raises:
        BadInput: An output that is no file, or is another one too.
    """
    refuse_output(request.output, "--output")  # first: the others are named after it
    outputs = {"--output": request.output, "--quarantine": request.quarantine_path, "its journal": journal_path(request.output)}
    outputs |= {"--report": report} if report else {}
    taken: dict[str, str] = {}
    for flag, path in outputs.items():
        refuse_output(path, flag)
        place = os.path.realpath(path)
        if place in taken:
            raise BadInput(f"{flag} {path}: is {taken[place]} too: choose another name")
        taken[place] = flag


def index(folders: list[Path], request: IndexRequest, say: Say) -> int:
    """Examine what is new or changed below some folders, then write list and quarantine.

    Returns:
        0; 2 where nothing can be used (list and quarantine are written); 75 where it was stopped; the same command continues.

    Raises:
        BadInput: A folder is not there, nothing in them is a volume, or the output cannot be written.
    """
    refuse_outputs(request)
    for folder in folders:  # before a salt is made
        if not Path(user_path(folder)).is_dir():
            raise BadInput(f"{shown(folder)}: no such folder: give folders of volumes")
    request = request.salted()
    with Journal(journal_path(request.output), request.row_options()) as journal:
        if journal.was_of_other_options:
            logger.warning("%s: was made with other options; everything is examined again", journal.path)
        units = [u for u in walk(folders) if _is_of_shard(u, request.shard)]
        todo = [u for u in units if not journal.knows(u.path, u.stamp)]
        doubted = sum(journal.doubts(u.path) for u in todo)
        again = f", {doubted} set aside before that are looked at again" if doubted else ""
        below = ", ".join(shown(f) for f in folders)
        say(f"{len(units)} files and series below {below}; {len(todo) - doubted} new or changed{again}")
        if not _examine(todo, journal, request):
            say(f"stopped; the same command continues ({shown(journal.path)} has what was seen)")
            return EXIT_RESUMABLE
        journal.keep_only({u.path for u in units})
        if not units and request.shard == (1, 1):
            raise BadInput(f"{', '.join(shown(f) for f in folders)}: no {FORMAT_NAMES} file in it")
        return _write(journal, request, say)


def merge(lists: list[Path], request: IndexRequest, say: Say) -> int:
    """One list of several shards' journals, as one run of everything would write it.

    Returns:
        As of `index`.

    Raises:
        BadInput: A journal is missing, or they were made with different options.
    """
    sources = [(path, *read_journal(journal_path(path))) for path in lists]
    for path, options, _ in sources[1:]:
        if options != sources[0][1]:
            raise BadInput(
                f"{path}: was made with other options than {lists[0]}: index its shard again with the same ones; lists of "
                f"several folders need one --id-salt, or one {FILE} in each"
            )
    refuse_outputs(request)
    own = journal_path(request.output)
    if own in (journal_path(path) for path in lists):
        raise BadInput(f"--output {request.output}: is one of the lists to merge: choose another")
    own.unlink(missing_ok=True)
    _take_salt(lists, request.output, sources[0][1].get("id_salt", ""))
    with Journal(own, sources[0][1]) as journal:
        for _, _, records in sources:
            for unit, stamp, rows in records:
                journal.add(unit, stamp, rows)
        return _write(journal, request, say)


def _take_salt(lists: list[Path], output: Path, mark: str) -> None:
    """The salt of the merged lists becomes that of the folder of the one they make, so that a later run of it hashes alike."""
    path = salt_path(lists[0])
    if mark and path.exists() and mark_of(salt := kept_salt(path)) == mark:
        write_salt(salt_path(output), salt)


def _is_of_shard(unit: Unit, shard: tuple[int, int]) -> bool:
    """By the hash of the path below its folder, so that a shard is the same on every machine."""
    which, of = shard
    name = os.path.relpath(unit.path, unit.root).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) % of == which - 1


def _examine(todo: list[Unit], journal: Journal, request: IndexRequest) -> bool:
    """Whether all of it was done before a signal; finished units are in the journal either way."""

    def one_by_one(batch: tuple[Unit, ...]) -> list[tuple[Unit]]:
        return [(unit,) for unit in batch]

    work = partial(examine, request.examine)
    batches = (tuple(todo[i : i + UNITS_PER_BATCH]) for i in range(0, len(todo), UNITS_PER_BATCH))
    bad = 0
    with (
        stop_requests() as stop_asked,
        Progress(len(todo), "files and series") as progress,
        closing(unordered(work, batches, request.num_workers, died, parts=one_by_one)) as results,  # ends the processes
    ):
        for done in results:
            for unit, rows in done:
                journal.add(unit.path, unit.stamp, rows)
                bad += sum("entry" not in row for row in rows)
            progress.update(len(done), note=f"{bad} bad")
            if stop_asked:
                return progress.done == len(todo)
    return True


def _write(journal: Journal, request: IndexRequest, say: Say) -> int:
    """Judge all rows and write list and quarantine, row by row; the exit code.

    Raises:
        BadInput: They cannot be written.
    """
    set_aside: list[Row] = []
    counts: Counter[str] = Counter()
    parted = parted_series(journal.rows())
    folders = {row["entry"].get("dataset") for row in journal.rows() if row.get("is_folder")}

    def listed() -> Iterator[Row]:
        for is_good, row in judge(journal.rows(), request.limits, parted):
            if is_good:
                counts["label maps"] += bool(row.get("label_map"))
                counts["with notes"] += bool(row.get("header_notes"))
                is_folder = len(folders) > 1 and row.get("dataset") in folders  # perhaps a patient's, of many
                yield {**row, "dataset_is_folder": True} if is_folder else row
            else:
                set_aside.append(row)

    try:
        journal.compact()
        num_listed = write_datalist(request.output, listed())
        _write_json(request.quarantine_path, set_aside)
    except OSError as err:
        raise BadInput(f"{request.output}: {err.strerror}: make room or choose another --output; nothing is lost") from err
    labels = f" ({counts['label maps']} of them label maps, which `dinov2 curate` leaves out)" if counts["label maps"] else ""
    say(f"{shown(request.output)}: {num_listed} volumes{labels}")
    if counts["with notes"]:
        say(f"  {counts['with notes']} with headers that contradict themselves: see `header_notes`; the affine counts")
    reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(r["reason"] for r in set_aside).most_common())
    say(f"{shown(request.quarantine_path)}: {len(set_aside)} set aside" + (f": {reasons}" if reasons else ""))
    if not num_listed and request.shard == (1, 1):
        logger.error("%s: nothing in it can be used: %s has the reasons", shown(request.output), shown(request.quarantine_path))
        return EXIT_BAD_INPUT
    return EXIT_OK


def _write_json(path: Path, rows: list[Row]) -> None:
    text = ",\n".join(to_json(row) for row in rows)
    write_text(path, f"[\n{text}\n]\n" if rows else "[]\n")


def parse_shard(text: str) -> tuple[int, int]:
    """`2/4` to (2, 4).

    Raises:
        BadInput: Anything else.
    """
    which, _, of = text.partition("/")
    if not (which.isdecimal() and of.isdecimal() and 1 <= int(which) <= int(of)):
        raise BadInput(f"--shard {text}: write it as 1/4 ... 4/4")
    return int(which), int(of)
