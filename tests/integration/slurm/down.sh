#!/usr/bin/env bash
# Ends what up.sh started in FOLDER.
folder=$1
for file in "$folder/slurmd.pid" "$folder/slurmctld.pid" /run/munge/munged.pid; do
  [ -s "$file" ] && kill "$(cat "$file")" 2>/dev/null
done
true
