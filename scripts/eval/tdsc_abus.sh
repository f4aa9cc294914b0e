#!/usr/bin/env bash
# Segmentation of TDSC-ABUS with the paper's arguments; more in paper.sh.
# Usage: scripts/eval/tdsc_abus.sh WEIGHTS BASE_DATA_DIR OUTPUT_DIR [further flags of segmentation3d.py]
source "$(dirname "$0")/paper.sh"
segmentation TDSC-ABUS "$@"
