#!/usr/bin/env bash
# A one-node SLURM without systemd, for the tests: FOLDER/slurm.conf, daemons in the background. Needs root, slurm-wlm and munge.
# Its timeouts are long, so that a busy machine's node is not given up for being slow.
set -euo pipefail
folder=$(realpath "$1") host=$(hostname -s)
mkdir -p "$folder"/{ctld,slurmd,log} /run/munge
chown munge:munge /run/munge /var/log/munge /var/lib/munge
[ -s /run/munge/munged.pid ] && kill -0 "$(cat /run/munge/munged.pid)" 2>/dev/null \
  || su -s /bin/sh munge -c 'munged --pid-file=/run/munge/munged.pid'
cat > "$folder/slurm.conf" <<C
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/ctld
SlurmdSpoolDir=$folder/slurmd
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
SlurmctldPort=$2
SlurmdPort=$3
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=0
MessageTimeout=100
UnkillableStepTimeout=600
KillWait=5
JobRequeue=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=$(($(awk '/MemTotal/{print $2}' /proc/meminfo) / 1024 - 512)) State=UNKNOWN
PartitionName=debug Nodes=$host Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
C
export SLURM_CONF="$folder/slurm.conf"
slurmctld -i -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF"
for _ in $(seq 100); do
  [ "$(sinfo -h -o %T 2>/dev/null)" = idle ] && exit 0
  sleep 0.2
done
sinfo || true
tail -n 20 "$folder"/log/*.log
exit 1
