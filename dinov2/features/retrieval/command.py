"""`dinov2 retrieve`: a query to its nearest scans, or to the same place in others, written as a page and a CSV file.

torch is imported only where the query has to be embedded.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dinov2.data.datalist import Entry
from dinov2.errors import EXIT_OK, BadInput
from dinov2.features.retrieval.index import neighbours, open_index
from dinov2.features.retrieval.page import Found, place_in_words, write_csv, write_page
from dinov2.features.retrieval.places import WINDOW, TokenGrid, best_place, read_grid, window_around
from dinov2.features.retrieval.table import NETWORK, FeatureTable, label, rows_left
from dinov2.files import refuse_output, user_path
from dinov2.geometry import Spacing
from dinov2.logging import Say
from dinov2.logging.progress import Progress

if TYPE_CHECKING:
    from dinov2.features.encoder import Features

logger = logging.getLogger(__name__)

LISTED = 20  # hits that are told on the terminal


@dataclass(frozen=True)
class RetrieveRequest:
    """What is asked for.

    Attributes:
        table: Of `dinov2 embed`.
        query: A row's number, path or id, or another scan's file.
        output: HTML; the CSV file lies beside it.
        at_mm: A place of the query's world (RAS+), which is looked for in others; None: whole scans are compared.
        k: Number of hits.
        where: `column=value` each, that a hit has.
        exclude_same: Columns in which a hit differs from the query.
        features: The column in which whole scans are compared, `cls` or `pooled`.
        weights: To embed the query with; None: those that the table names.
        config_file: Of the network, for weights that do not tell.
        device: For embedding the query.
        base_data_dir: Where the table's paths begin; None: where the table says.
    """

    table: Path
    query: str
    output: Path
    at_mm: Spacing | None = None
    k: int = 5
    where: tuple[str, ...] = ()
    exclude_same: tuple[str, ...] = ()
    features: str = "cls"
    weights: str | None = None
    config_file: str | None = None
    device: str = "auto"
    base_data_dir: Path | None = None


def retrieve(request: RetrieveRequest, say: Say) -> int:
    """Search, and write what was found.

    Raises:
        BadInput: The table, the query or a filter cannot be used, or nothing is left to be found.
    """
    csv_path = _outputs(request.output)
    table = FeatureTable(request.table, request.base_data_dir)
    if not 1 <= request.k <= table.num_rows:
        raise BadInput(f"-k {request.k}: {table.path} has {table.num_rows} scans: give a number from 1 to that")
    row = table.find(request.query)
    rows = rows_left(table, request.where, request.exclude_same, row)
    search = _similar_scans if request.at_mm is None else _same_places
    query, hits, how = search(table, request, row, rows)
    write_csv(hits, csv_path)
    write_page(query, hits, [*_what_was_searched(request, len(rows)), how], table.percentiles, request.output)
    for rank, hit in enumerate(hits[:LISTED], 1):
        place = "" if hit.place_mm is None else f"  at {place_in_words(hit.place_mm)} mm"
        say(f"{rank:3}  {hit.distance:.4f}  {hit.name}{place}")
    if len(hits) < request.k:
        say(f"only {len(hits)} hits for -k {request.k}: no more scans are left to be searched")
    say(f"{request.output}: open it in a browser; {csv_path} has the same as a table")
    return EXIT_OK


def _outputs(output: Path) -> Path:
    """The CSV file beside a page.

    Raises:
        BadInput: One of them cannot be written under its name.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise BadInput(f"--output {output}: is a page: give a name that ends in .html")
    if not output.absolute().parent.is_dir():
        raise BadInput(f"--output {output}: there is no folder {output.parent}: make it first")
    for path in (output, output.with_suffix(".csv")):
        refuse_output(path, "--output")
    return output.with_suffix(".csv")


def _what_was_searched(request: RetrieveRequest, num_rows: int) -> list[str]:
    filters = [f"with {text}" for text in request.where]
    filters += [f"of another {column} than the query's" for column in request.exclude_same]
    return [f"{num_rows:,} scans of {request.table.name} were compared" + (f", {' and '.join(filters)}." if filters else ".")]


def _similar_scans(
    table: FeatureTable, request: RetrieveRequest, row: int | None, rows: np.ndarray
) -> tuple[Found, list[Found], str]:
    """The query, its hits, and how they were compared."""
    index = open_index(table, request.features)
    if row is None:
        entry, features = embedded(table, request)
        vector = (features.cls if request.features == "cls" else features.pooled)[0].cpu().numpy()
        query = Found(request.query, entry)
    else:
        vector, query = index[row], found_row(table, row)
    numbers, distances = neighbours(index, vector, request.k, rows)
    hits = [found_row(table, int(n), distance=float(d)) for n, d in zip(numbers, distances, strict=True)]
    what = {"cls": "class tokens", "pooled": "mean patch tokens"}[request.features]
    return query, hits, f"The distance is 1 - the cosine of two scans' {what}, from 0 (the same direction) to 2."


def _same_places(
    table: FeatureTable, request: RetrieveRequest, row: int | None, rows: np.ndarray
) -> tuple[Found, list[Found], str]:
    """The query's place, the best place of each of the nearest scans, and how they were compared."""
    place_mm = np.array(request.at_mm)
    table.patches(int(rows[0]))  # refuses a table without them before anything is embedded
    if row is None:
        entry, features = embedded(table, request)
        grid = TokenGrid.of(features.patch[0].cpu().numpy(), features.affine.numpy(), request.query)
        query = Found(request.query, entry, place_mm=place_mm)
    else:
        grid, query = read_grid(table.patches(row)), found_row(table, row, place_mm=place_mm)
    if not grid.holds(place_mm):
        box = ", ".join(f"{x} {a:.0f} to {b:.0f}" for x, a, b in zip("xyz", *grid.corners_mm(), strict=True))
        at = place_in_words(place_mm)
        raise BadInput(f"--at {at}: lies outside of {query.name}, whose patches are at {box} mm: give a place within")
    window = window_around(grid, place_mm)
    found: list[tuple[float, int, np.ndarray]] = []
    with Progress(len(rows), "scans") as progress:
        for other in rows.tolist():
            try:
                best_mm, distance = best_place(window, read_grid(table.patches(other)))
                found.append((distance, other, best_mm))
            except BadInput as err:
                logger.warning("left out: %s", err)
            progress.update()
    if not found:
        raise BadInput(f"{table.path}: none of its files of patch tokens can be read: make it again with --patch-tokens")
    nearest = sorted(found, key=lambda item: item[:2])[: request.k]
    edge = f"a cube of {WINDOW} patches ({WINDOW * grid.step_mm:.0f} mm)"
    how = f"The distance is 1 - the mean cosine of the patch tokens in {edge} around the place, less each scan's mean token."
    return query, [found_row(table, other, distance, best_mm) for distance, other, best_mm in nearest], how


def found_row(table: FeatureTable, row: int, distance: float | None = None, place_mm: np.ndarray | None = None) -> Found:
    """A scan of the table for the page."""
    facts = table.facts(row)
    return Found(label(facts), table.entry(row), row, distance, place_mm, facts)


def embedded(table: FeatureTable, request: RetrieveRequest) -> tuple[Entry, Features]:
    """The features of a scan that is not in the table, made as the table's were.

    Raises:
        BadInput: There is no such file, the weights are others, or the scan cannot be used.
    """
    path = user_path(request.query)
    if not Path(path).exists():
        what = f"no such scan, and no row of {table.path} has this path or id"
        raise BadInput(f"--query {request.query}: {what}: give a file, or a row from 0 to {table.num_rows - 1}")
    source = request.weights or table.weights
    if source is None or NETWORK not in table.key:
        raise BadInput(
            f"{table.path}: does not say by which weights it was made, so --query {request.query} cannot be embedded: "
            "make the table again with `dinov2 embed`, or ask by a row"
        )
    from dinov2.features.encoder import load_encoder
    from dinov2.features.setup import ours_alone
    from dinov2.features.spacing import spacing_of
    from dinov2.features.views import View

    dtype, seed = table.about.get("dtype", "auto"), table.about.get("untrained") or 0
    named = ours_alone(table.about.get("encoder"), table.path)
    encoder = load_encoder(source, request.device, request.config_file, dtype, seed, encoder=named)
    if encoder.fingerprint() != table.key[NETWORK]:
        raise BadInput(
            f"{table.path}: was made with other weights (or another dtype) than {source}, whose features mean something else: "
            "give the table's own by --weights"
        )
    entry = Entry(path, ())
    key = table.key
    view = View(key["mode"], key["size"], key["overlap"], key.get("layers", 1), spacing_mm=spacing_of(key.get("spacing")))
    return entry, encoder.encode_scan(encoder.load([entry]), view)
