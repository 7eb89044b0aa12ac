#!/bin/sh
# Sees to it that the programs of the cluster tests are there: installs them as root on Debian and Ubuntu, else names them.
set -eu
PATH=$PATH:/usr/sbin:/sbin
packages="iproute2 mount openssh-client openssh-server munge slurm-wlm openmpi-bin pdsh"
programs="ip mount unshare nsenter setpriv ssh ssh-keygen sshd munged slurmctld slurmd sbatch srun scontrol mpirun pdsh"

missing=
for program in $programs; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
if [ -z "$missing" ]; then exit 0; fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "make test-cluster needs$missing (as root, Debian and Ubuntu: apt-get install $packages)" >&2
    exit 1
fi

# Only the programs are wanted: the tests start their own daemons, this machine gets none.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
# shellcheck disable=SC2086
apt-get install -y -q --no-install-recommends $packages
