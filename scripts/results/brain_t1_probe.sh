#!/usr/bin/env bash
# Sex and age in docs/results.md: cross-validated probes of the demo encoder's features of 53 brains, and what the earlier
# protocol did to them.
# Usage: scripts/results/brain_t1_probe.sh DATA_FOLDER OUTPUT_FOLDER [SEEDS of untrained networks; default: 0 1 2]
# DATA_FOLDER holds splits.json and brain_t1/{images,participants.csv}. Start it again to continue.
set -euo pipefail
data=$(realpath "${1:?data folder}") out=$(realpath -m "${2:?output folder}")
seeds=${3:-0 1 2}
cd "$(dirname "$0")/../.."
[ -d .venv ] && source .venv/bin/activate
mkdir -p "$out"
[ -f "$out/list.json" ] || python -m dinov2 index "$data/brain_t1/images" --output "$out/list.json"
embed() { python -m dinov2 embed "$out/list.json" --weights demo --output "$out/$1.parquet" "${@:2}"; }
embed features
embed resized --mode resize --size 48
untrained=()
for seed in $seeds; do
  embed "untrained_$seed" --untrained "$seed"
  untrained+=("$out/untrained_$seed.parquet")
done
for target in sex age; do
  python -m dinov2 probe "$out/features.parquet" --table "$data/brain_t1/participants.csv" --target "$target" \
    --untrained "${untrained[@]}" --covariates volume --output "$out/$target"
done
python scripts/results/brain_t1_protocol.py "$out/features.parquet" "$out/resized.parquet" "$data" > "$out/protocol.txt"
cat "$out/protocol.txt"
