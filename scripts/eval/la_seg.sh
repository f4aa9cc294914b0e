#!/usr/bin/env bash
# Segmentation of LA-SEG with the paper's arguments; more in paper.sh.
# Usage: scripts/eval/la_seg.sh WEIGHTS BASE_DATA_DIR OUTPUT_DIR [further flags of segmentation3d.py]
source "$(dirname "$0")/paper.sh"
segmentation LA-SEG "$@"
