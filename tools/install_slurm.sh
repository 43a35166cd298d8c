#!/bin/sh
# Installs the real Slurm that tests/slurm starts on this machine: slurmctld, slurmd, the commands, and munge.
#
# Nothing is configured and no daemon is left running: the tests bring their own configuration and start their own.
# Needs root and a Debian (or Ubuntu); elsewhere it says what to install, and the tests skip themselves until then.
set -eu

programs="munged slurmctld slurmd sbatch srun scontrol squeue scancel sinfo"
PATH=$PATH:/usr/sbin:/sbin

missing() {
    for program in $programs; do
        command -v "$program" >/dev/null || printf '%s ' "$program"
    done
}

if [ -z "$(missing)" ]; then
    echo "slurm: $(slurmctld -V) and munge are installed"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "slurm: missing $(missing)- install Slurm (slurmctld, slurmd and the client commands) and munge with this system's package manager" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "slurm: missing $(missing)- run as root: apt-get install --no-install-recommends slurm-wlm munge" >&2
    exit 1
fi

# The packages start system services where there is an init system. 101 is how policy-rc.d says no; a file somebody
# else put there stays.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
# Fresh images come without package lists, old ones with lists that name packages which are gone.
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null

if [ -n "$(missing)" ]; then
    echo "slurm: still missing $(missing)after installing slurm-wlm and munge" >&2
    exit 1
fi
echo "slurm: installed $(slurmctld -V) and munge"
