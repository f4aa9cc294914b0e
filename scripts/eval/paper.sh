# For the scripts beside it: a dataset of the paper with the paper's arguments.
#   segmentation DATASET WEIGHTS BASE_DATA_DIR OUTPUT_DIR [further flags of segmentation3d.py]
#   linear DATASET WEIGHTS BASE_DATA_DIR OUTPUT_DIR [further flags of linear3d.py]
# WEIGHTS: the teacher of the high-resolution stage. LAUNCH is the program to start instead; as a SLURM job:
#   LAUNCH="dinov2/run/eval/segmentation.py --ngpus 1 --partition P"   (linear.py for a probe)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -d .venv ] && source .venv/bin/activate

segmentation() { # 30,000 iterations of 2 cases (8 crops of 112 cubed), one GPU
  flags=(--segmentation-head ViTAdapterUNETR --epochs 100 --epoch-length 300 --eval-iters 600 --warmup-iters 3000
    --resize-scale 1.0 --batch-size 2 --learning-rate 1e-4)
  run dinov2/eval/segmentation3d.py "$@"
}

linear() { # 12,500 iterations of 32 scans of 112 cubed, one GPU, five seeds
  flags=(--num-seeds 5 --epochs 100 --epoch-length 125 --batch-size 32)
  run dinov2/eval/linear3d.py "$@"
}

run() { # PROGRAM DATASET WEIGHTS BASE_DATA_DIR OUTPUT_DIR FLAGS...: of a flag given twice the last counts
  local program=$1 dataset=$2 weights=${3:?weights} data=${4:?base data folder} out=${5:?output folder}
  shift 5
  # shellcheck disable=SC2086 # the launcher has flags of its own
  exec python ${LAUNCH:-$program} --config-file train/vit3d_highres --dataset-name "$dataset" --pretrained-weights "$weights" \
    --base-data-dir "$data" --output-dir "$out" --image-size 112 --num-workers 8 "${flags[@]}" "$@"
}
