#!/usr/bin/env bash
# Ends what up.sh started in FOLDER.
folder=$1
SLURM_CONF="$folder/slurm.conf" timeout 10 scancel --full --signal=KILL --user root 2>/dev/null
SLURM_CONF="$folder/slurm.conf" timeout 10 scancel --user root 2>/dev/null
sleep 1
for file in "$folder/slurmd.pid" "$folder/slurmctld.pid" /run/munge/munged.pid; do
  [ -s "$file" ] && kill "$(cat "$file")" 2>/dev/null
done
sleep 1
for pid in $(pgrep -x 'slurmd|slurmstepd'); do # a step that was killed half-way keeps both alive; they are told by their log
  ls -l "/proc/$pid/fd" "/proc/$pid/cwd" 2>/dev/null | grep -qF "$folder/" && kill -KILL "$pid"
done
true
