"""What an installation can do, without the repository: the command, features of a shipped head, an operator as its reference.

python -I release_smoke.py FOLDER      # one line; an exception where something is wrong
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

import dinov2
from dinov2.ops import compiled_operators, ms_deform_attn_3d
from dinov2.ops.ms_deform_attn import ms_deform_attn_3d_reference

PACKAGE = Path(dinov2.__file__).parent
COMMAND = str(Path(sys.executable).with_name("dinov2"))
WORDS = ["--weights", "demo", "--device", "cpu", "--workers", "0", "--mode", "resize", "--size", "32"]
TOLERANCE = 1e-5  # of sums in float32


def main(folder: Path) -> int:
    subprocess.run([COMMAND, "--help"], check=True, stdout=subprocess.DEVNULL)
    table = folder / "feats.parquet"
    subprocess.run([COMMAND, "embed", str(PACKAGE / "demo" / "scans"), *WORDS, "--output", str(table)], check=True)
    features = np.stack(pq.read_table(table)["cls"].to_numpy())
    assert features.shape == (2, 96) and np.isfinite(features).all() and np.ptp(features, 0).max() > 0, features
    rng = torch.Generator().manual_seed(0)
    shapes = [(5, 4, 3), (3, 2, 2)]
    value = torch.randn(2, 72, 2, 8, generator=rng)
    locations = torch.rand(2, 7, 2, 2, 4, 3, generator=rng) * 1.4 - 0.2  # outside too
    weights = torch.rand(2, 7, 2, 2, 4, generator=rng)
    ours = ms_deform_attn_3d(value, shapes, locations, weights)
    apart = float((ours - ms_deform_attn_3d_reference(value, shapes, locations, weights)).abs().max())
    assert apart < TOLERANCE, apart
    is_compiled, what = compiled_operators()
    python = ".".join(map(str, sys.version_info[:3]))
    operators = "compiled" if is_compiled else what.split(":")[0]
    print(f"Python {python}, torch {torch.__version__}, numpy {metadata.version('numpy')}: works; operators: {operators}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
