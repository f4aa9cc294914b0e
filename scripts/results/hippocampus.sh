#!/usr/bin/env bash
# The hippocampus table of docs/results.md: three heads on a frozen tiny teacher, and on the same network untrained.
# Usage: scripts/results/hippocampus.sh DATA_FOLDER OUTPUT_FOLDER [HEAD...]
# DATA_FOLDER holds splits.json, hippocampus/{images,labels} and brain_t1/images. Start it again to continue; finished parts are
# not repeated. Half an hour a network for ViTAdapterUNETR on one core, less for the others; then scripts/results/hippocampus.py.
set -euo pipefail
data=$(realpath "${1:?data folder}") out=$(realpath -m "${2:?output folder}")
shift 2
cd "$(dirname "$0")/../.."
[ -d .venv ] && source .venv/bin/activate
mkdir -p "$out"
list=$out/MSD-Hippocampus_100_datalist.json
[ -f "$list" ] || python -m dinov2 split --images "$data/hippocampus/images" --labels "$data/hippocampus/labels" \
  --output "$list" --parts "$data/splits.json" --parts-key hippocampus
[ -f "$out/pretrain.json" ] || python scripts/local_datalist.py "$data" "$out/pretrain.json"
python dinov2/train/train3d.py --config-file pretrain/tiny_cpu --output-dir "$out/teacher" --cache-dir "$out/cache" \
  train.dataset_path="$out/pretrain.json"
teacher=$out/teacher/eval/training_1999/teacher_checkpoint.pth
[ $# -gt 0 ] || set -- Linear ViTAdapterUNETR UNETR
for head in "$@"; do
  case $head in Linear) epochs=15 ;; ViTAdapterUNETR) epochs=9 ;; UNETR) epochs=6 ;; esac
  for weights in "$teacher" random; do
    python dinov2/eval/segmentation3d.py --config-file pretrain/tiny_cpu --pretrained-weights "$weights" \
      --output-dir "$out/$head-$([ "$weights" = random ] && echo random || echo trained)" --cache-dir "$out/cases" \
      --dataset-name MSD-Hippocampus --base-data-dir "$out" --segmentation-head "$head" --image-size 32 \
      --batch-size 1 --epochs "$epochs" --epoch-length 100 --eval-iters 100 --warmup-iters 100 --num-workers 0 \
      --learning-rate 1e-3 --opts "segmentation.decoder_channels=[48,24,16,8]" segmentation.inplanes=16 train.num_threads=1
  done
done
