#!/usr/bin/env bash
# BTCV with the paper's arguments: 30,000 iterations of 2 cases (8 crops of 112 cubed), one GPU.
# Usage: scripts/eval/btcv.sh WEIGHTS BASE_DATA_DIR OUTPUT_DIR [further flags of segmentation3d.py]
# WEIGHTS: the teacher of the high-resolution stage. As a SLURM job: LAUNCH="dinov2/run/eval/segmentation.py --ngpus 1 --partition P".
set -euo pipefail
weights=${1:?weights} data=${2:?base data folder} out=${3:?output folder}
shift 3
cd "$(dirname "$0")/../.."
[ -d .venv ] && source .venv/bin/activate
# shellcheck disable=SC2086 # the launcher has flags of its own
exec python ${LAUNCH:-dinov2/eval/segmentation3d.py} --config-file train/vit3d_highres --pretrained-weights "$weights" \
  --output-dir "$out" --dataset-name BTCV --base-data-dir "$data" --segmentation-head ViTAdapterUNETR \
  --epochs 100 --epoch-length 300 --eval-iters 600 --warmup-iters 3000 --image-size 112 --resize-scale 1.0 \
  --batch-size 2 --num-workers 8 --learning-rate 1e-4 "$@"
