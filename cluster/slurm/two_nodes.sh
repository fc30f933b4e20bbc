#!/usr/bin/env bash
# A real two-node Slurm on this one machine, to try and test job scripts.
#
#   cluster/slurm/two_nodes.sh start  [FOLDER]    munge, slurmctld and two slurmd; does nothing if they run
#   cluster/slurm/two_nodes.sh stop   [FOLDER]    cancels the jobs and stops all of it
#   cluster/slurm/two_nodes.sh status [FOLDER]    the nodes; exit code 0 if both can take jobs
#
# After start: export SLURM_CONF=FOLDER/slurm.conf, then sbatch, squeue, … as on any cluster.
# Everything it writes is in FOLDER (default: /tmp/llmtrain-slurm). Needs root and the Debian packages
# slurm-wlm and munge; leaves the system's own munge and Slurm alone. SLURM_PORT (default 16817) and the
# two ports after it must be free. The first job has the number SLURM_FIRST_JOB (default 1): launch/slurm.sbatch makes a
# port of it, so that jobs of two such clusters on one machine need numbers of their own.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
verb=${1:-}
folder=${2:-/tmp/llmtrain-slurm}
port=${SLURM_PORT:-16817}
[[ $folder == /* ]] || folder=$PWD/$folder
export SLURM_CONF=$folder/slurm.conf

fail() { echo "two_nodes.sh: $1" >&2; exit 2; }

# Slurm and munge are daemons that Debian installs where only root's PATH looks.
PATH=$PATH:/usr/sbin:/sbin

alive() { # PID NAME
    # Its own name, for numbers are used again; no zombie, for a container's first process may reap none.
    [[ $(cat "/proc/${1:-none}/stat" 2>/dev/null) == "$1 ($2) "[!Z]* ]]
}

runs() { alive "$(cat "$folder/$1.pid" 2>/dev/null)" "${1%%.*}"; } # NAME of a daemon, as in FOLDER/NAME.pid

stopped() { ! alive "$@"; }

ready() {
    # Without a controller sinfo would try for a minute.
    runs slurmctld || return 1
    [[ $(sinfo --noheader --Node --states=idle,mixed,allocated --format=%N 2>&1 | sort -u | xargs) == "node1 node2" ]]
}

no_jobs() { [[ -z $(squeue --noheader) ]]; }

wait_until() { # SECONDS COMMAND…
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.2
    done
}

free_port() { # NAME PORT
    if ! runs "$1" && (: <"/dev/tcp/127.0.0.1/$2") 2>/dev/null; then
        fail "port $2 is in use by another program; set SLURM_PORT to the first of three free ports"
    fi
}

start() {
    [[ $EUID == 0 ]] || fail "got user $(id -un); allowed: root; start it with sudo, or in a container"
    local program
    for program in munged slurmctld slurmd sinfo; do
        command -v "$program" >/dev/null ||
            fail "got no $program; needs the packages slurm-wlm and munge: apt-get install slurm-wlm munge"
    done
    if ! ready; then
        free_port slurmctld "$port"
        free_port slurmd.node1 $((port + 1))
        free_port slurmd.node2 $((port + 2))
        mkdir -p "$folder"/state "$folder"/spool.node1 "$folder"/spool.node2
        # munged trusts no socket or key that others could have put there.
        chmod 755 "$folder"
        sed -e "s|@FOLDER@|$folder|g" -e "s|@HOSTNAME@|$(uname -n | cut -d. -f1)|g" -e "s|@PORT@|$port|g" \
            -e "s|@PORT1@|$((port + 1))|g" -e "s|@PORT2@|$((port + 2))|g" \
            -e "s|@FIRST_JOB@|${SLURM_FIRST_JOB:-1}|g" "$here/slurm.conf" >"$SLURM_CONF"
        if [[ ! -s $folder/munge.key ]]; then
            (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
        fi
        runs munged || munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" \
            --log-file="$folder/munged.log" --pid-file="$folder/munged.pid" --seed-file="$folder/munged.seed"
        runs slurmctld || slurmctld
        runs slurmd.node1 || slurmd -N node1
        runs slurmd.node2 || slurmd -N node2
        if ! wait_until 30 ready; then
            tail -n 5 "$folder"/*.log >&2
            stop >&2
            fail "the nodes were not ready after 30 seconds; the logs above are in $folder"
        fi
    fi
    echo "Slurm runs with node1 and node2. For its commands: export SLURM_CONF=$SLURM_CONF"
}

stop() {
    local name pid
    if runs slurmctld; then
        scancel --user="$(id -un)"
        wait_until 15 no_jobs || true
    fi
    for name in slurmd.node1 slurmd.node2 slurmctld munged; do
        if runs "$name"; then
            pid=$(cat "$folder/$name.pid")
            kill "$pid"
            # Not by its pid file, which goes before it does.
            wait_until 15 stopped "$pid" "${name%%.*}" || kill -9 "$pid"
        fi
    done
    echo "Slurm is stopped; its logs are in $folder"
}

status() {
    ready || { echo "Slurm does not run with $SLURM_CONF" >&2; exit 1; }
    sinfo --Node --long
    squeue
}

case $verb in
start | stop | status) "$verb" ;;
*) fail "got '$verb'; allowed: start, stop, status" ;;
esac
