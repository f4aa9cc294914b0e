#!/usr/bin/env bash
# The brain_t1 table of docs/results.md: sex, age group and age from frozen features, by the demo encoder and untrained networks.
# Usage: scripts/results/brain_t1.sh DATA_FOLDER OUTPUT_FOLDER
# DATA_FOLDER holds splits.json and brain_t1/{images,participants.csv}. Start it again to continue. Then scripts/results/tables.py.
set -euo pipefail
data=$(realpath "${1:?data folder}") out=$(realpath -m "${2:?output folder}")
cd "$(dirname "$0")/../.."
[ -d .venv ] && source .venv/bin/activate
mkdir -p "$out"
for task in sex age_group age; do
  list=$out/brain_t1_${task}_cls_datalist.json
  [ -f "$list" ] || python -m dinov2 split --table "$data/brain_t1/participants.csv" --label-column "${task%_group}" \
    --output "$list" --parts "$data/splits.json" --parts-key brain_t1
  networks=(trained untrained-0)
  [ "$task" != age ] || networks+=(untrained-1 untrained-2)
  for weights in "${networks[@]}"; do
    case $weights in trained) from=dinov2/weights/demo.safetensors seed=0 ;; *) from=random seed=${weights#untrained-} ;; esac
    case $task in
      age) program=(dinov2/eval/regression.py) ;;
      *) program=(dinov2/eval/linear3d.py --num-seeds 5 --epochs 20 --epoch-length 125 --eval-period-iterations 125 --cached-views 2) ;;
    esac
    python "${program[@]}" --config-file pretrain/demo_weights --pretrained-weights "$from" --output-dir "$out/$task-$weights" \
      --dataset-name "brain_t1_$task" --base-data-dir "$out" --cache-dir "$out/cache" \
      --image-size 48 --batch-size 32 --num-workers 0 --opts train.num_threads=1 train.seed="$seed"
  done
done
