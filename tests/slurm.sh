#!/bin/sh
# A SLURM of one machine, for the tests marked slurm: `slurm.sh up FOLDER`, `slurm.sh down FOLDER`. Debian: slurm-wlm.
# Everything it writes is in FOLDER, and SLURM_CONF=FOLDER/slurm.conf is how commands find it. Needs root.
set -eu
what=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
export SLURM_CONF="$folder/slurm.conf"

down() {
    for name in slurmd slurmctld munged; do
        if [ -f "$folder/$name.pid" ]; then
            kill "$(cat "$folder/$name.pid")" 2>/dev/null || true
        fi
    done
}

up() {
    for program in munged slurmctld slurmd sbatch; do
        command -v $program >/dev/null || { echo "$program is not installed: apt-get install slurm-wlm" >&2; exit 1; }
    done
    host=$(hostname -s)
    mkdir -p "$folder/state" "$folder/spool" "$folder/munge"
    chmod 700 "$folder/munge"
    dd if=/dev/urandom of="$folder/munge/key" bs=128 count=1 2>/dev/null
    chmod 400 "$folder/munge/key"
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    cat > "$SLURM_CONF" <<END
ClusterName=one
SlurmctldHost=$host
SlurmUser=$(id -un)
SlurmctldPort=$((16800 + $$ % 1000))
SlurmdPort=$((17900 + $$ % 1000))
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=$host CPUs=4 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
END
    echo "CgroupPlugin=cgroup/v1" > "$folder/cgroup.conf"
    slurmctld
    slurmd
    for _ in $(seq 60); do
        if sinfo -h -o %T 2>/dev/null | grep -q idle; then exit 0; fi
        sleep 1
    done
    tail -n 5 "$folder/slurmctld.log" >&2
    tail -n 5 "$folder/slurmd.log" >&2
    down
    exit 1
}

$what
