"""How far `dinov2 retrieve --at` is from the same place of another brain: median error, mean over people with its interval.

    python scripts/results/same_place.py FEATS [--places 12]

`FEATS` is a table of `dinov2 embed --patch-tokens`, a scan a person. Places are asked as by the measure "the same place in
another brain" (`dinov2/eval/measures/region_retrieval.py`: the middles of crops of 32 mm in scans of 2 mm, as the brains
lie), `--places` of each scan at random; all other scans answer. Places correspond by their share of the foreground's box.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dinov2.eval.measures.region_retrieval import places_of
from dinov2.eval.metrics.statistics import bootstrap_interval
from dinov2.features.retrieval.places import best_place, read_grid, window_around
from dinov2.features.retrieval.table import FeatureTable
from dinov2.features.scans import Scan, load_scan

REGION_VOX, ASK_VOX = 16, 8


def in_box_mm(scan: Scan, place_mm: np.ndarray) -> np.ndarray:
    """A place of the world along the axes of the prepared scan, mm from its first voxel."""
    inverse = np.linalg.inv(scan.affine)
    return (inverse[:3, :3] @ place_mm + inverse[:3, 3]) * np.linalg.norm(scan.affine[:3, :3], axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, metavar="FEATS")
    parser.add_argument("--places", type=int, default=12, help="asked of each scan")
    args = parser.parse_args()
    table = FeatureTable(args.table)
    rows = range(table.num_rows)
    scans = [load_scan([table.entry(row)]) for row in rows]
    grids = [read_grid(table.patches(row)) for row in rows]
    medians = []
    for a in tqdm(rows, disable=None):
        asked = places_of(scans[a], REGION_VOX, ASK_VOX)
        chosen = np.random.default_rng(a).permutation(len(asked.centres_mm))[: args.places]
        spacing = np.linalg.norm(scans[a].affine[:3, :3], axis=0)
        errors = []
        for centre_mm in asked.centres_mm[chosen]:
            window = window_around(grids[a], scans[a].affine[:3, :3] @ (centre_mm / spacing) + scans[a].affine[:3, 3])
            for b in rows:
                if b != a:
                    found_mm, _ = best_place(window, grids[b])
                    extent = np.array(scans[b].voxels.shape[1:]) * np.linalg.norm(scans[b].affine[:3, :3], axis=0)
                    errors.append(np.linalg.norm(in_box_mm(scans[b], found_mm) - centre_mm / asked.extent_mm * extent))
        medians.append(float(np.median(errors)))
    (interval,) = bootstrap_interval(lambda drawn: [np.mean(np.array(medians)[drawn])], list(map(str, rows)))
    low, high = interval or (np.nan, np.nan)
    mean = f"{np.mean(medians):.2f} mm ({low:.2f} to {high:.2f})"
    print(f"median error {mean}, mean of {len(medians)} scans; {args.places} places each")


if __name__ == "__main__":
    main()
