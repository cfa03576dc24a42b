#!/bin/bash
# A Slurm of two nodes on this machine, for the tests, without systemd.
#
#   tests/slurm.sh install     the packages, of Debian or Ubuntu, as root; nothing if they are there
#   tests/slurm.sh up DIR      prints the path of its configuration, which goes into $SLURM_CONF
#   tests/slurm.sh down DIR
#
# Each node has two GPUs that do not exist, so that job files which ask for some can run.
set -euo pipefail

install() {
    command -v slurmctld > /dev/null && command -v slurmd > /dev/null && return
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
}

up() {
    local folder host port
    folder=$(realpath -m "$1")
    host=$(hostname -s)
    port=$((20000 + $$ % 10000))
    mkdir -p "$folder"/{state,n1,n2,log} /run/munge
    chown munge: /run/munge
    chmod 755 /run/munge
    [ -s /etc/munge/munge.key ] || runuser -u munge -- mungekey --create
    if ! munge -n &> /dev/null; then
        runuser -u munge -- munged
        touch "$folder/munged"
    fi
    printf "Name=gpu File=%s\n" /dev/null /dev/zero > "$folder/gres.conf"
    cat > "$folder/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
SlurmctldPort=$port
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/log/slurmctld.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdLogFile=$folder/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=10
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld -f "$SLURM_CONF"
    for node in n1 n2; do slurmd -f "$SLURM_CONF" -N "$node"; done
    for _ in $(seq 60); do
        if [ "$(sinfo -h -o %T 2> /dev/null | sort -u)" = idle ]; then
            echo "$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    sinfo >&2
    cat "$folder"/log/* >&2
    return 1
}

down() {
    local folder
    folder=$(realpath "$1")
    for name in slurmd-n1 slurmd-n2 slurmctld; do
        if [ -f "$folder/$name.pid" ]; then kill "$(cat "$folder/$name.pid")"; fi
    done
    if [ -f "$folder/munged" ]; then kill "$(cat /run/munge/munged.pid)"; fi
}

"$@"
