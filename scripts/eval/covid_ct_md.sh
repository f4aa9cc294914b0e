#!/usr/bin/env bash
# Linear probing on COVID-CT-MD with the paper's arguments; more in paper.sh.
# Usage: scripts/eval/covid_ct_md.sh WEIGHTS BASE_DATA_DIR OUTPUT_DIR [further flags of linear3d.py]
source "$(dirname "$0")/paper.sh"
linear COVID-CT-MD "$@"
