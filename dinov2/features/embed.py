"""`dinov2 embed`: a row of features for every scan of a list or folder, by processes that load and a network that sees.

The work is cut into parts of the list (`embed_table.py`). A shard, a rank of torchrun or a job of an array takes every n-th
part; whoever finishes the last one writes the table.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2.configs.loader import without_path_keys
from dinov2.data.corpus.domain import kind_of
from dinov2.data.corpus.index.command import IndexRequest, index
from dinov2.data.corpus.index.examine import content_sha, died_reading, problem
from dinov2.data.corpus.index.quality import Limits
from dinov2.data.datalist import Datalist, Entry, read_datalist
from dinov2.data.pool import unordered
from dinov2.data.volumes.opening import open_volume
from dinov2.distributed.precision import DTYPES
from dinov2.errors import EXIT_OK, EXIT_RESUMABLE, BadInput, BadVolume
from dinov2.features.embed_rows import ListedScans
from dinov2.features.embed_table import EmbeddingTable, Row
from dinov2.features.encoder import DTYPE_NAMES, Encoder
from dinov2.features.scans import Scan
from dinov2.features.spacing import resampled
from dinov2.features.views import View
from dinov2.files import path_for_list, read_json
from dinov2.geometry import Spacing
from dinov2.logging import Say
from dinov2.logging.folder import locked_folder
from dinov2.logging.progress import Progress
from dinov2.signals import stop_requests

logger = logging.getLogger(__name__)

FORMAT = 3  # of the table; raised with its columns, so that no table is begun in one and ended in another
FEW_SCANS = 16  # are loaded in this process: others take seconds to start
MANY_PATCHES = 30_000  # in one pass: attention, quadratic in them, is then nearly all of the time, minutes a scan on a CPU
Loader = Callable[[list[Entry]], Scan]
Loaded = tuple[int, Scan | None, Row]  # place in the list, the scan, what is known of it or why there is none
Stored = tuple[int, tuple[Path, str, np.ndarray] | None, Row]  # the same with the scan's voxels in a file, name and affine


@dataclass(frozen=True)
class EmbedRequest:
    """What is asked for.

    Attributes:
        output: The Parquet file; the other files lie beside it.
        view: How scans are shown to the network.
        patch_tokens: Keep them too, a file a scan.
        shard: (which, of how many), from 1; (1, 1) is everything.
        num_workers: Processes that load; 0: this one.
    """

    output: Path
    view: View = field(default_factory=View)
    patch_tokens: bool = False
    shard: tuple[int, int] = (1, 1)
    num_workers: int = 0


def embed(source: Path, encoder: Encoder, request: EmbedRequest, say: Say) -> int:
    """Make the table, or a shard's parts of it; what is there already is not made again.

    Args:
        source: A datalist, or a folder of volumes, which is indexed first (label maps and duplicates are left out).
        encoder: The network.
        request: What to make.
        say: Takes the lines for the user.

    Returns:
        0, or 75 where it was stopped; the same command continues.

    Raises:
        BadInput: The list, the view or the output cannot be used, or no scan can.
    """
    request.view.fitted(encoder.backbone)  # refuses what does not fit before anything is read
    set_aside: list[Row] = []
    if source.is_dir():
        found = _index(source, request, say)
        if found is None:
            return EXIT_RESUMABLE
        datalist, set_aside = found
    else:
        datalist = read_datalist(source)
    table = EmbeddingTable(
        request.output, _key(datalist, encoder, request), len(datalist), encoder.embed_dim, request.patch_tokens
    )
    if table.is_done:
        say(f"{table.output}: is there already, of the same list and weights; remove it to make it again")
        return EXIT_OK
    which, of = request.shard
    with locked_folder(table.parts / "locks" / f"{which}of{of}"):
        if not _make_parts(ListedScans(datalist), encoder, request, table):
            say(f"stopped; the same command continues ({table.parts} has what is done)")
            return EXIT_RESUMABLE
    missing = len(table.missing()) if table.parts.exists() else 0
    if missing:
        say(f"shard {which}/{of} is done; {missing} of {table.num_parts} parts are still to come from others")
        return EXIT_OK
    num_rows, set_aside = table.assemble(_about(datalist, encoder, table), set_aside)
    say(f"{table.output}: {num_rows} scans, {encoder.embed_dim} numbers a column")
    reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(row["reason"] for row in set_aside).most_common())
    say(f"{table.quarantine}: {len(set_aside)} set aside" + (f": {reasons}" if reasons else ""))
    return EXIT_OK


def shard_of_rank(shard: tuple[int, int]) -> tuple[int, int]:
    """The shard of this process: torchrun's rank where there are several, else as asked.

    Raises:
        BadInput: Both were asked for.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return shard
    if shard != (1, 1):
        raise BadInput("--shard under torchrun: its ranks are the shards already, leave --shard out")
    return rank + 1, world_size


def device_of_rank(device: str) -> str:
    """`auto` under torchrun: a GPU for each rank of this machine."""
    if device == "auto" and int(os.environ.get("WORLD_SIZE", 1)) > 1 and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    return device


def _index(folder: Path, request: EmbedRequest, say: Say) -> tuple[Datalist, list[Row]] | None:
    """The scans below a folder, listed beside the output, and what was set aside; None where it was stopped."""
    if request.shard != (1, 1):
        raise BadInput(f"{folder}: shards need a list that stays the same: `dinov2 index` the folder, then embed the list")
    if request.output.absolute().resolve().is_relative_to(folder.resolve()):
        raise BadInput(f"--output {request.output}: lies in the folder of scans {folder}: choose a place outside it")
    found = request.output.with_name(request.output.name.removesuffix(".parquet") + ".list.json")
    asked = IndexRequest(found, limits=Limits(min_axis=1, max_non_finite=1.0), num_workers=request.num_workers)
    if index([folder], asked, say) != EXIT_OK:
        return None
    datalist = read_datalist(found)
    scans = [e for e in datalist.entries if not e.extra.get("label_map")]
    if not scans:
        raise BadInput(f"{folder}: only label maps in it: give a folder or a list of scans")
    return Datalist(scans, datalist.sha256, datalist.path), read_json(asked.quarantine_path)


def _key(datalist: Datalist, encoder: Encoder, request: EmbedRequest) -> dict[str, Any]:
    """All that the table's content depends on; its words are for the message that two differ."""
    view = asdict(request.view)
    del view["batch_size"]
    spacing = view.pop(
        "spacing_mm"
    )  # named where it is not the scans' own: tables from before there was a choice stay as they are
    if spacing is not None:
        view["spacing"] = list(spacing)
    if not request.patch_tokens:
        del view["layers"]
    return {
        "table format": FORMAT,
        "list": datalist.sha256,
        "number of scans": len(datalist),
        "network (weights or dtype)": encoder.fingerprint(),
        "patch tokens": request.patch_tokens,
        **view,
    }


def _about(datalist: Datalist, encoder: Encoder, table: EmbeddingTable) -> dict[str, Any]:
    """What the table says besides its key: enough to build its network again, and where weights and paths begin from there."""
    weights = encoder.weights
    return {
        "licence": encoder.licence,
        "percentiles": list(encoder.percentiles),
        "weights": path_for_list(weights, table.output.parent) if weights and os.path.isabs(weights) else weights,
        "untrained": encoder.untrained,
        **({"encoder": encoder.named} if encoder.named else {}),
        "dtype": next(name for name in DTYPE_NAMES if DTYPES[name] == encoder.dtype),
        "config": None if encoder.config is None else without_path_keys(encoder.config),
        "folder": path_for_list(Path(datalist.path).absolute().parent, table.output.parent),
    }


def _make_parts(listed: ListedScans, encoder: Encoder, request: EmbedRequest, table: EmbeddingTable) -> bool:
    """Whether this shard's missing parts were all made before a signal; finished ones are kept either way."""
    which, of = request.shard
    folder = table.parts / "loaded"
    parts = [part for part in table.missing() if part % of == which - 1]
    todo = [place for part in parts for place in table.rows_of(part)]
    num_workers = 0 if len(todo) <= FEW_SCANS else request.num_workers
    done: dict[int, list[tuple[int, bool, Row]]] = {part: [] for part in parts}
    num_bad, is_told = 0, False
    with (
        stop_requests() as stop_asked,
        Progress(len(todo), "scans") as progress,
        closing(
            _loaded(listed.entries, todo, encoder.loader, request.view.spacing_mm, num_workers, folder)
        ) as scans,  # ends the processes
    ):
        for place, scan, row in scans:
            if stop_asked:
                return False
            is_told = is_told or (scan is not None and _warn_of_many_patches(scan, encoder, request.view))
            is_good = scan is not None
            if scan is not None:
                known, name = {**listed.row(place), **row}, listed.file_name(place)
                is_good, row = _row(scan, known, name, encoder, request, table)
            part = table.part_of(place)
            done[part].append((place, is_good, row))
            num_bad += not is_good
            if len(done[part]) == len(table.rows_of(part)):
                rows = sorted(done.pop(part), key=lambda item: item[0])
                table.write_part(part, [r for _, good, r in rows if good], [r for _, good, r in rows if not good])
            progress.update(note=f"{num_bad} bad")
    return True


def _warn_of_many_patches(scan: Scan, encoder: Encoder, view: View) -> bool:
    """Whether the scan is so large for one pass that the user was told what is faster."""
    patches = int(np.prod([-(-n // encoder.backbone.patch_size) for n in scan.voxels.shape[1:]]))
    if view.mode != "full_image" or patches <= MANY_PATCHES:
        return False
    shape = "x".join(map(str, scan.voxels.shape[1:]))
    words = (
        "%s: %s voxels are %d patches in one pass, and the cost grows with their square: use --mode sliding_window or resize"
    )
    logger.warning(words, scan.name, shape, patches)
    return True


def _loaded(
    entries: list[Entry],
    todo: list[int],
    load: Loader,
    spacing_mm: Spacing | None,
    num_workers: int,
    folder: Path,
) -> Generator[Loaded, None, None]:
    """Scans as they come, a few ahead of the network.

    Processes hand voxels over in files, not through their pipe: one that is killed amid a long message would leave the reader
    waiting for its end.
    """
    items = ((place, entries[place]) for place in todo)
    if num_workers == 0:
        yield from map(partial(_load, load, spacing_mm), items)
        return
    folder.mkdir(exist_ok=True)
    for place, stored, row in unordered(partial(_store, load, spacing_mm, folder), items, num_workers, _died):
        if stored is None:
            yield place, None, row
            continue
        path, name, affine = stored
        scan = Scan(name, np.load(path), affine, *kind_of(entries[place]))
        path.unlink()
        yield place, scan, row


def _store(load: Loader, spacing_mm: Spacing | None, folder: Path, item: tuple[int, Entry]) -> Stored:
    """What `_load` gives, as it comes out of a process.

    Raises:
        BadInput: The disk is full.
    """
    place, scan, row = _load(load, spacing_mm, item)
    if scan is None:
        return place, None, row
    path = folder / f"{place}.{os.getpid()}.npy"
    try:
        np.save(path, scan.voxels)
    except OSError as err:
        raise BadInput(f"{path}: cannot be written ({err.strerror}): make room; the same command continues") from err
    return place, (path, scan.name, scan.affine), row


def _load(load: Loader, spacing_mm: Spacing | None, item: tuple[int, Entry]) -> Loaded:
    place, entry = item
    try:
        scan = resampled(load([entry]), spacing_mm)  # here, where several processes share the work
        sha = entry.extra.get("sha") or content_sha(entry)
        spacing = open_volume(entry).spacing_mm
    except BadVolume as err:
        return place, None, problem(entry.image, err.reason, str(err))
    except MemoryError:
        return place, None, problem(entry.image, "memory", "does not fit the memory of this process: use fewer --workers")
    return place, scan, {"sha": sha, "spacing": spacing}


def _died(item: tuple[int, Entry], how: str) -> Stored:
    return item[0], None, died_reading(item[1].image, how)


def _row(
    scan: Scan, known: Row, file_name: str, encoder: Encoder, request: EmbedRequest, table: EmbeddingTable
) -> tuple[bool, Row]:
    """(True, a row of the table) or (False, one of the quarantine)."""
    try:
        found = encoder.encode_scan(scan, request.view)
    except BadVolume as err:
        return False, problem(scan.name, err.reason, str(err))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        shape = "x".join(map(str, scan.voxels.shape[1:]))
        return False, problem(scan.name, "memory", f"{shape} voxels do not fit the device: use --mode sliding_window or resize")
    row = {**known, "cls": found.cls[0].cpu().numpy(), "pooled": found.pooled[0].cpu().numpy()}
    if request.patch_tokens:
        row["patches"] = table.write_patches(file_name, patch=found.patch[0].cpu().numpy(), affine=found.affine.numpy())
    return True, row
