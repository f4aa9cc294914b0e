#!/usr/bin/env bash
# Linear probing on COVID-CT-MD with the paper's arguments: 12,500 iterations of 32 scans of 112 cubed, one GPU, five seeds.
# Usage: scripts/eval/covid_ct_md.sh WEIGHTS BASE_DATA_DIR OUTPUT_DIR [further flags of linear3d.py, such as --dataset-percent 25]
# WEIGHTS: the teacher of the high-resolution stage. As a SLURM job: LAUNCH="dinov2/run/eval/linear.py --ngpus 1 --partition P".
set -euo pipefail
weights=${1:?weights} data=${2:?base data folder} out=${3:?output folder}
shift 3
cd "$(dirname "$0")/../.."
[ -d .venv ] && source .venv/bin/activate
# shellcheck disable=SC2086 # the launcher has flags of its own
exec python ${LAUNCH:-dinov2/eval/linear3d.py} --config-file train/vit3d_highres --pretrained-weights "$weights" \
  --output-dir "$out" --dataset-name COVID-CT-MD --base-data-dir "$data" --num-seeds 5 \
  --epochs 100 --epoch-length 125 --image-size 112 --batch-size 32 --num-workers 8 "$@"
