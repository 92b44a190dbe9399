#!/usr/bin/env bash
# Installs SLURM, its accounting and their tools where this is root on Debian, for the tests that start a real cluster.
# Starts no daemon. Elsewhere, without packages, or with MEDTRAIN_NO_APT=1, it says so and those tests skip.
set -uo pipefail

packages=(munge slurm-client slurmctld slurmd slurmdbd mariadb-server mariadb-client iproute2 util-linux)

missing() {
    local package
    for package in "${packages[@]}"; do
        dpkg-query -W -f '${Status}\n' "$package" 2>/dev/null | grep -q 'install ok installed' || printf '%s\n' "$package"
    done
}

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not root on Debian: the tests on a real SLURM skip"
    exit 0
fi
wanted=$(missing)
[ -n "$wanted" ] || exit 0
if [ "${MEDTRAIN_NO_APT:-0}" = 1 ]; then
    echo "MEDTRAIN_NO_APT=1: nothing is installed, the tests on a real SLURM skip"
    exit 0
fi
echo "installing" $wanted
# Debian asks this file whether a package may start its daemon
policy=/usr/sbin/policy-rc.d
made=
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    made=1
fi
log=$(mktemp)
apt-get update -qq >"$log" 2>&1 &&
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $wanted >>"$log" 2>&1 ||
    { tail -n 5 "$log" && echo "SLURM can not be installed: the tests on a real SLURM skip"; }
rm -f "$log"
[ -z "$made" ] || rm -f "$policy"
