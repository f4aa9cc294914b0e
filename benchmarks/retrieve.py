"""`dinov2 retrieve` among many scans: seconds to make the index once, and of an answer; beside float32 brute force.

    python benchmarks/retrieve.py [--rows 100000] [--width 384] [--queries 5]

The table is generated. An answer is everything from the table's name to the hits: opening table and index, filters
(`--where`, `--exclude-same`), neighbours; what is left out is the start of Python and the page's pictures. The reference has
all vectors in memory, of length 1 and in float32, and does nothing but the product and the order; what it takes to read them
is said beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2.features.retrieval.index import neighbours, open_index
from dinov2.features.retrieval.table import FeatureTable, rows_left

ROWS_PER_GROUP = 1024  # as of `dinov2 embed`
K = 5


def write_table(path: Path, num_rows: int, width: int) -> None:
    """Rows of four modalities and ten scans a patient, with vectors that are alike, as those of one kind of scan are."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=width).astype(np.float32) * 3
    names = {
        "id": [f"scan_{i:07}" for i in range(num_rows)],
        "path": [f"patient_{i // 10:06}/scan_{i:07}.nii.gz" for i in range(num_rows)],
        "patient": [f"patient_{i // 10:06}" for i in range(num_rows)],
        "modality": [("CT", "MR", "PET", "US")[i % 4] for i in range(num_rows)],
    }
    vectors = pa.list_(pa.float32(), width)
    schema = pa.schema([*((name, pa.string()) for name in names), ("cls", vectors), ("pooled", vectors)])
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        for first in range(0, num_rows, ROWS_PER_GROUP):
            some = slice(first, min(first + ROWS_PER_GROUP, num_rows))
            values = common + rng.normal(size=(some.stop - first, width)).astype(np.float32)
            column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width)
            writer.write_table(pa.table([*(pa.array(v[some]) for v in names.values()), column, column], schema))


def answer(path: Path, query: int, filters: tuple[list[str], list[str]]) -> tuple[np.ndarray, float, float]:
    """Rows, and the seconds they took: of the clock, of the processor."""
    start, start_cpu = time.perf_counter(), time.process_time()
    table = FeatureTable(path)
    rows = rows_left(table, *filters, query)
    index = open_index(table, "cls")
    found, _ = neighbours(index, index[query], K, rows)
    return found, time.perf_counter() - start, time.process_time() - start_cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=384, help="E of the vectors")
    parser.add_argument("--queries", type=int, default=5)
    args = parser.parse_args()
    queries = np.random.default_rng(1).integers(args.rows, size=args.queries).tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "feats.parquet")
        write_table(path, args.rows, args.width)
        _, first_s, _ = answer(path, 0, ([], []))
        plain = [answer(path, q, ([], [])) for q in queries]
        filtered = [answer(path, q, (["modality=CT"], ["patient"])) for q in queries]
        start = time.perf_counter()
        vectors = np.concatenate(list(FeatureTable(path).vectors("cls")))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        read_s = time.perf_counter() - start
    agree, reference = 0, []
    for query, (found, _, _) in zip(queries, plain, strict=True):
        start = time.perf_counter()
        cosine = vectors @ vectors[query]
        best = [row for row in np.argsort(-cosine, kind="stable")[: K + 1] if row != query][:K]
        reference.append(time.perf_counter() - start)
        agree += len(set(found.tolist()) & set(best))
    print(f"{args.rows} rows of {args.width}, the best and the median of {args.queries} queries")
    for name, answers in (("all scans", plain), ("--where and --exclude-same", filtered)):
        _, clock_s, cpu_s = zip(*answers, strict=True)
        print(f"{name:28}{min(clock_s):7.3f} {np.median(clock_s):7.3f} s; of the processor {min(cpu_s):.3f} s")
    print(f"{'float32 in memory':28}{min(reference):7.3f} {np.median(reference):7.3f} s, after {read_s:.1f} s of reading")
    print(f"the first answer, which makes the index: {first_s:.1f} s; hits of brute force found: {agree} of {K * args.queries}")


if __name__ == "__main__":
    main()
