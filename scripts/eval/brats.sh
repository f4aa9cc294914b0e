#!/usr/bin/env bash
# Segmentation of BraTS with the paper's arguments; more in paper.sh.
# Usage: scripts/eval/brats.sh WEIGHTS BASE_DATA_DIR OUTPUT_DIR [further flags of segmentation3d.py]
source "$(dirname "$0")/paper.sh"
segmentation BraTS "$@"
