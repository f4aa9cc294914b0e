#!/usr/bin/env bash
# The small study of docs/mini_study.md, step by step: pretraining, learning rates, study, tables. Start it again to continue; what
# is finished is not repeated.
# Usage: scripts/results/mini_study.sh DATA_FOLDER OUTPUT_FOLDER lists|pretrain|rates|run|probe|report...
# DATA_FOLDER holds splits.json, hippocampus/{images,labels} and brain_t1/{images,participants.csv}.
set -euo pipefail
data=$(realpath "${1:?data folder}") out=$(realpath -m "${2:?output folder}")
shift 2
cd "$(dirname "$0")/../.."
[ -d .venv ] && source .venv/bin/activate
mkdir -p "$out/lists" "$out/rates"
dino=$out/pretrain/3dino/run/eval/training_1999/teacher_checkpoint.pth monai=$out/pretrain/monai_vit/eval/training_799/teacher_checkpoint.pth

lists() { # the study's; one for the learning rates, tested on half of the validation cases
  local d=$out/lists/MSD-Hippocampus-single_100_datalist.json
  [ -f "$d" ] || python -m dinov2 split --images "$data/hippocampus/images" --labels "$data/hippocampus/labels" \
    --output "$d" --parts "$data/splits.json" --parts-key hippocampus
  for task in sex age; do
    d=$out/lists/brain_t1_${task}_cls_datalist.json
    [ -f "$d" ] || python -m dinov2 split --table "$data/brain_t1/participants.csv" --label-column "$task" \
      --output "$d" --parts "$data/splits.json" --parts-key brain_t1
  done
  python - "$out" <<'P'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
name = "MSD-Hippocampus-single_100_datalist.json"
cases = json.loads((out / "lists" / name).read_text())
held = cases["validation"]
(out / "rates" / name).write_text(json.dumps({**cases, "validation": held[::2], "test": held[1::2]}))
P
}

pretrain() { # 3DINO is the run whose course docs/results.md has, on training scans alone; MONAI-ViT is trained on the same list
  python scripts/results/online.py "$data" "$out/pretrain/3dino" optim.epochs=20 train.seed=1
  python dinov2/train/train3d.py --config-file pretrain/monai_vit_tiny_cpu --output-dir "$out/pretrain/monai_vit" \
    --cache-dir "$out/pretrain/3dino/cache" train.dataset_path="$out/pretrain/3dino/list.json" train.num_threads=1 optim.epochs=8
}

study() { # COMMAND OUTPUT LISTS [WORD...]
  local command=$1 folder=$2 lists=$3
  shift 3
  python -m dinov2 study "$command" mini "base_data_dir=$lists" "output_dir=$folder" "methods.3DINO.weights=$dino" \
    "methods.3DINO-linear.weights=$dino" "methods.MONAI-ViT.weights=$monai" "methods.MONAI-ViT-linear.weights=$monai" "$@"
}

probe() { # sex and age of all 53 people from their whole scans, cross-validated
  local d=$out/probe name target
  [ -f "$d/list.json" ] || python -m dinov2 index "$data/brain_t1/images" --output "$d/list.json"
  python -m dinov2 embed "$d/list.json" --weights "$dino" --output "$d/3DINO.parquet"
  python -m dinov2 embed "$d/list.json" --weights "$monai" --output "$d/MONAI-ViT.parquet"
  python -m dinov2 embed "$d/list.json" --weights "$dino" --untrained 0 --output "$d/untrained.parquet"
  for name in 3DINO MONAI-ViT; do
    for target in sex age; do
      python -m dinov2 probe "$d/$name.parquet" --table "$data/brain_t1/participants.csv" --target "$target" \
        --untrained "$d/untrained.parquet" --covariates volume --output "$d/${name}_$target"
    done
  done
}

for step in "$@"; do
  case $step in
    lists) lists ;;
    pretrain) pretrain ;;
    rates)
      methods=(3DINO MONAI-ViT Random SwinRandom UNet 3DINO-linear MONAI-ViT-linear Random-linear)
      for rate in 1e-3 3e-3; do
        names=$(printf 'MSD-Hippocampus/%s/13.8/100,' "${methods[@]}")
        rates=("${methods[@]/#/methods.}")
        study run "$out/rates/$rate" "$out/rates" --jobs 2 --cells "${names%,}" "seeds=[100]" \
          "${rates[@]/%/.budget.learning_rate=$rate}" "datasets.brain_t1_sex.base_data_dir=$out/lists" "cache_dir=$out/cases"
      done
      ;;
    run) study run "$out/study" "$out/lists" --jobs 2 "cache_dir=$out/cases" ;;
    probe) probe ;;
    report)
      study collect "$out/study" "$out/lists" "cache_dir=$out/cases"
      study report "$out/study" "$out/lists" "cache_dir=$out/cases"
      ;;
    *) echo "no step $step: lists, pretrain, rates, run, probe, report" >&2 && exit 2 ;;
  esac
done
