"""Write a pretraining datalist from a data folder that has a `splits.json` (training and validation parts only).

    python scripts/local_datalist.py DATA_FOLDER LIST.json [--parts training]

`splits.json` maps a data set to {"training": [...], "validation": [...], "test": [...]}, file names below
`DATA_FOLDER/<data set>/images`. Test cases are left out, so that they are never seen before their evaluation.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2.data import write_datalist
from dinov2.data.volumes.opening import describe
from dinov2.errors import BadInput

PARTS = ("training", "validation")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    try:
        splits = json.loads((args.data_folder / "splits.json").read_text())
        items = [
            {**describe((args.data_folder / name / "images" / file).absolute()), "dataset": name}
            for name, parts in splits.items()
            if isinstance(parts, dict)
            for part in args.parts
            for file in parts[part]
        ]
        count = write_datalist(args.output, items)
    except (OSError, ValueError, KeyError, BadInput) as err:
        print(f"{args.data_folder}: cannot make a datalist: {err}", file=sys.stderr)
        return 2
    print(f"{count} volumes -> {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
