#!/usr/bin/env bash
# Linear probing on ICBM with the paper's arguments; more in paper.sh.
# Usage: scripts/eval/icbm.sh WEIGHTS BASE_DATA_DIR OUTPUT_DIR [further flags of linear3d.py]
source "$(dirname "$0")/paper.sh"
linear ICBM "$@"
