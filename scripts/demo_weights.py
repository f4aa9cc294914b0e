"""Train the demo encoder again, from its data to OUTPUT_FOLDER/demo.safetensors; the same command continues a stopped one.

    python scripts/demo_weights.py DATA_FOLDER OUTPUT_FOLDER [key=value ...]

`DATA_FOLDER` is as in `scripts/local_datalist.py`; of it only the training and validation scans of `brain_t1` (CC0) are used,
beside as many made volumes again of the template's variants (`dinov2.demo.generate`), at 1 mm and with contrasts of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2.checkpointer.export import export
from dinov2.configs import load_and_merge_config_3d
from dinov2.data import write_datalist
from dinov2.data.corpus.index.examine import content_sha
from dinov2.data.datalist import Entry
from dinov2.data.volumes.opening import describe
from dinov2.demo.generate import generate
from dinov2.errors import EXIT_OK
from dinov2.run.train import pretrain

CONFIG = "pretrain/demo_weights"
LICENCE = "Apache-2.0"
NUM_MADE, MADE_SPACING_MM, MADE_SEED = 48, 1.0, 1


def described(path: Path) -> dict:
    """A list's entry with the hash, modality and organ that travel with the weights."""
    item = describe(path)
    return {**item, "sha": content_sha(Entry(item["image"], tuple(item["shape"]))), "modality": "MR", "organ": "brain"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    parts = json.loads((args.data_folder / "splits.json").read_text())["brain_t1"]
    scans = [args.data_folder / "brain_t1" / "images" / name for part in ("training", "validation") for name in parts[part]]
    made = [c.image for c in generate(args.output / "made", NUM_MADE, 1, MADE_SEED, MADE_SPACING_MM)]
    datalist = args.output / "list.json"
    if not datalist.exists():
        write_datalist(datalist, [described(path.absolute()) for path in (*scans, *made)])
    words = [f"train.dataset_path={datalist}", *args.overrides]
    where = ["--output-dir", str(args.output / "run"), "--cache-dir", str(args.output / "cache")]
    code = pretrain.main(["--config-file", CONFIG, *where, *words])
    if code == EXIT_OK:
        optim, train = (load_and_merge_config_3d(CONFIG, words)[part] for part in ("optim", "train"))
        last = args.output / "run" / "eval" / f"training_{optim.epochs * train.OFFICIAL_EPOCH_LENGTH - 1}"
        export(last / "teacher_checkpoint.pth", args.output / "demo.safetensors", 0, with_heads=False, licence=LICENCE)
    return code


if __name__ == "__main__":
    sys.exit(main())
