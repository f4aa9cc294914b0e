#!/usr/bin/env bash
# Does a 2D network's weights as the start (student.pretrained_weights_inflation) help on a CPU? Three short trainings, from nothing,
# from the weights by `central` and by `mean`, each measured as it learns: labels of patches by a linear map (read-out on the
# hippocampus, validation scans). Writes OUTPUT_FOLDER/start2d.md: the read-out's Dice at each measurement, a row a start and seed.
# Usage: scripts/results/start2d.sh WEIGHTS DATA_FOLDER OUTPUT_FOLDER [key=value ...]
# WEIGHTS: DINOv2's dinov2_vits14_pretrain.pth or another of its layout; the network's keys are read off its tensors. DATA_FOLDER: as
# of hippocampus.sh. SEEDS="0 1 2" chooses seeds, optim.epochs=5 is 500 steps. Start it again to continue. With ViT-S about 5 s a
# step on one core (estimated from its operations).
set -euo pipefail
weights=$(realpath "${1:?weights}") data=$(realpath "${2:?data folder}") out=$(realpath -m "${3:?output folder}")
shift 3
cd "$(dirname "$0")/../.."
[ -d .venv ] && source .venv/bin/activate
mkdir -p "$out"
list=$out/MSD-Hippocampus_100_datalist.json
[ -f "$list" ] || python -m dinov2 split --images "$data/hippocampus/images" --labels "$data/hippocampus/labels" \
  --output "$list" --parts "$data/splits.json" --parts-key hippocampus
[ -f "$out/pretrain.json" ] || python scripts/local_datalist.py "$data" "$out/pretrain.json" --parts training
keys=$(python - "$weights" <<'P'
import sys
from dinov2.checkpointer.teacher import open_trained
from dinov2.configs.schema import ARCH_SHAPES
from dinov2.models.inflation import student_keys

keys = student_keys(open_trained(sys.argv[1]).state, sys.argv[1])
size = (keys["embed_dim"], keys["depth"])
heads = next((heads for width, depth, heads in ARCH_SHAPES.values() if (width, depth) == size), max(1, size[0] // 64))
print(*(f"student.{key}={value}" for key, value in {**keys, "num_heads": heads}.items()))
P
)
for seed in ${SEEDS:-0}; do
  for how in scratch central mean; do
    start=(student.pretrained_weights="$weights" student.pretrained_weights_inflation="$how")
    [ "$how" = scratch ] && start=()
    # shellcheck disable=SC2086
    python -m dinov2.run.train.pretrain --config-file pretrain/tiny_cpu --output-dir "$out/$how-$seed" --cache-dir "$out/cache" \
      train.dataset_path="$out/pretrain.json" $keys student.patch_size=8 student.pos_encoding=learned student.init=trunc_normal \
      crops.global_crops_size=32 crops.local_crops_size=16 crops.region_mm=48 train.batch_size_per_gpu=8 train.seed="$seed" \
      train.num_threads=1 optim.epochs=5 optim.base_lr=2e-4 evaluation.eval_period_iterations=0 \
      evaluation.tasks_period_iterations=50 train.checkpoint_period=50 \
      "evaluation.tasks=[{kind: readout, dataset: MSD-Hippocampus, base_data_dir: \"$out\"}]" "${start[@]}" "$@"
  done
done
python - "$out" <<'P'
import sys
from pathlib import Path
from dinov2.logging import read_metrics
from dinov2.logging.metrics import EVALUATION_FILE

out = Path(sys.argv[1])
runs = {p.parent.name: read_metrics(p) for p in sorted(out.glob(f"*-*/{EVALUATION_FILE}"))}
steps = [row["iteration"] + 1 for row in next(iter(runs.values()))]
lines = [f"| start, seed | {' | '.join(map(str, steps))} |", "| --- " * (1 + len(steps)) + "|"]
for name, rows in runs.items():
    values = [f"{row['readout-MSD-Hippocampus/dice']:.3f}" for row in rows]
    lines.append(f"| {name} | {' | '.join(values)} |")
(out / "start2d.md").write_text("\n".join(lines) + "\n")
print(*lines, sep="\n")
P
