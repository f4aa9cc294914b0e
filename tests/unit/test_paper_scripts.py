"""`scripts/eval/*.sh` hand the paper's arguments to the programs, and further flags replace them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from dinov2.data.downstream.recipes import load_recipe
from dinov2.eval import linear3d, segmentation3d

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "eval"
SEGMENTATION = {"brats": "BraTS", "btcv": "BTCV", "la_seg": "LA-SEG", "tdsc_abus": "TDSC-ABUS"}
PROBES = {"icbm": "ICBM", "covid_ct_md": "COVID-CT-MD"}


@pytest.mark.parametrize("script, dataset", [*SEGMENTATION.items(), *PROBES.items()])
def test_a_script_hands_over_the_papers_arguments(script: str, dataset: str, tmp_path: Path) -> None:
    printer = tmp_path / "printer.py"
    printer.write_text("import sys\nprint(*sys.argv[1:], sep='\\n')\n")
    command = ["bash", str(SCRIPTS / f"{script}.sh"), "W", "DATA", "OUT", "--batch-size", "9"]
    env = {**os.environ, "LAUNCH": str(printer)}
    words = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.splitlines()
    module = segmentation3d if script in SEGMENTATION else linear3d
    args = module.get_args_parser().parse_args(words)
    assert (args.pretrained_weights, args.base_data_dir, args.output_dir, args.dataset_name) == ("W", "DATA", "OUT", dataset)
    assert load_recipe(args.dataset_name).name == dataset and args.config_file == "train/vit3d_highres"
    assert args.image_size == 112 and args.batch_size == 9
    assert args.epochs * args.epoch_length == (30_000 if script in SEGMENTATION else 12_500)
    missing = subprocess.run(command[:4], capture_output=True, text=True, env=env)
    assert missing.returncode != 0 and "output folder" in missing.stderr
