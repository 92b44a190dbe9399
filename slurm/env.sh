# Sourced by the other scripts: finds the checkout and makes its Python environment, once.
# MEDTRAIN_VENV names another place for it; MEDTRAIN_EXTRAS (such as "test") adds optional packages.

medtrain_root() {
    # sbatch runs a copy of the script from its spool folder, so $0 does not tell where the checkout is
    local here
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if [ -f "$here/constraints.txt" ]; then
        printf '%s\n' "$here"
    else
        printf '%s\n' "${SLURM_SUBMIT_DIR:-$PWD}"
    fi
}

medtrain_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    echo "error: no Python of at least 3.11 with venv on PATH: install python3.11 and python3.11-venv, or 'module load' one." >&2
    return 2
}

medtrain_env() {
    local root=$1 extras=${MEDTRAIN_EXTRAS:-} venv stamp python other
    venv=${MEDTRAIN_VENV:-$root/.venv}
    stamp=$(cat "$root/constraints.txt" "$root/setup.py" "$root/pyproject.toml" | sha256sum | cut -c1-16)
    if ! medtrain_has "$venv" "$stamp $root" "$extras"; then # what is there needs no lock, so others may use it, too
        other=$(sed -n '1s/^[^ ]* //p' "$venv/.medtrain" 2>/dev/null || true)
        if [ "$venv" != "$root/.venv" ] && [ -n "$other" ] && [ "$other" != "$root" ] && [ -f "$other/setup.py" ]; then
            echo "error: $venv is the environment of $other: give another MEDTRAIN_VENV, or use that checkout." >&2
            return 2
        fi
        if [ -z "${MEDTRAIN_UPGRADE:-}" ] && grep -qsE '^[0-9a-f]{16} ' "$venv/.medtrain" &&
            ! grep -qsxF "$stamp $root" "$venv/.medtrain"; then
            echo "error: $venv was installed for another version of this checkout, and jobs may be using it:" \
                "run 'bash slurm/install.sh' once none does." >&2
            return 2
        fi
        mkdir -p "$(dirname "$venv")"
        exec 9>"$venv.lock"
        # two jobs of one checkout do not install at once
        flock 9 2>/dev/null || medtrain_wait "$venv.installing" || return 2
        if ! medtrain_has "$venv" "$stamp $root" "$extras"; then
            # what was there stays
            extras=$(printf '%s\n' ${extras//,/ } $(sed 1d "$venv/.medtrain" 2>/dev/null) | sort -u | paste -sd, -)
            python=$(medtrain_python) || return 2
            echo "installing into $venv (once, a few minutes)"
            # cut off from here on it is not whole
            [ ! -f "$venv/.medtrain" ] || sed -i '1s/.*/being installed/' "$venv/.medtrain"
            "$python" -m venv "$venv" || return 1
            if ! "$venv/bin/python" -m pip install -qq --disable-pip-version-check -c "$root/constraints.txt" \
                -e "$root${extras:+[$extras]}"; then
                [ -z "${SLURM_JOB_ID:-}" ] ||
                    echo "error: this node can not install: run 'bash slurm/install.sh' on a login node first." >&2
                return 1
            fi
            printf '%s\n' "$stamp $root" ${extras//,/ } >"$venv/.medtrain"
        fi
        exec 9>&-
        medtrain_let_go
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-$(nproc)}}
}

# medtrain_wait FOLDER: a lock for file systems without flock: who makes the folder has it until its shell ends
medtrain_wait() {
    local end=$((SECONDS + ${MEDTRAIN_WAIT_S:-1800})) told=
    until mkdir "$1" 2>/dev/null; do
        if [ $SECONDS -ge $end ]; then
            echo "error: another shell seems to install there: remove the folder $1 if none does." >&2
            return 2
        fi
        [ -n "$told" ] || echo "waiting for another shell that installs there ($1)"
        told=1
        sleep 2
    done
    MEDTRAIN_LOCK=$1
    trap medtrain_let_go EXIT
}

medtrain_let_go() {
    [ -z "${MEDTRAIN_LOCK:-}" ] || rmdir "$MEDTRAIN_LOCK"
    MEDTRAIN_LOCK=
}

# medtrain_has VENV STAMP EXTRAS: whether all of it was installed there
medtrain_has() {
    local extra
    grep -qsxF "$2" "$1/.medtrain" || return 1
    for extra in ${3//,/ }; do
        grep -qsx "$extra" "$1/.medtrain" || return 1
    done
}

# medtrain_sweep SCRIPT SWEEP DEMO_SWEEP PHANTOM_COMMAND PHANTOM_FOLDER ARGUMENTS...: the whole job of an entry script.
medtrain_sweep() {
    local script=$1 sweep=$2 demo=$3 phantom=$4 phantoms=$5 root name data=${DATA:-} out=${OUT:-} rest=() status=0
    local began=$SECONDS
    shift 5
    root=$(medtrain_root)
    name=$(basename "$script" .sh)
    while [ $# -gt 0 ]; do
        case $1 in
        --data) data=${2:?--data needs a folder} && shift 2 ;;
        --out) out=${2:?--out needs a folder} && shift 2 ;;
        --data=*) data=${1#*=} && shift ;;
        --out=*) out=${1#*=} && shift ;;
        --sweep=*) sweep=${1#*=} && shift ;;
        --sweep) sweep=${2:?--sweep needs a name} && shift 2 ;;
        -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$script" && return 0 ;;
        *) rest+=("$1") && shift ;;
        esac
    done
    medtrain_env "$root" || return $?
    out=${out:-$root/runs/$name}
    if [ -n "${MEDTRAIN_BATCH:-}" ]; then
        unset OMP_NUM_THREADS # of this job; the others ask for CPUs of their own
        rest+=(--cluster "${CLUSTER:-here}" --follow)
        # before this job's own time limit: the sweep runs on, and the next turn follows it further
        trap 'scontrol requeue "$SLURM_JOB_ID" && exit 0; echo "error: not requeued; the sweep runs on: submit this again." >&2
            exit 1' USR1
    fi
    if [ -z "$data" ]; then
        data=$root/$phantoms
        sweep=$demo
        echo "no --data given: making phantoms in $data"
        python "$root/launch/prepare.py" "$phantom" --out "$data" || return $?
    fi
    if [ -n "${MEDTRAIN_BATCH:-}" ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && grep -qs '^finish,' "$out/jobs.csv"; then
        set -- follow "$out" # what it submitted before it was requeued itself
    else
        set -- "$sweep" --data "$data" --out "$out" ${rest[@]+"${rest[@]}"}
    fi
    if [ -n "${MEDTRAIN_BATCH:-}" ]; then
        python "$root/launch/sweep.py" "$@" & # a trap runs only while bash waits
        wait $! || status=$?
    else
        python "$root/launch/sweep.py" "$@" || status=$?
    fi
    echo "$name.sh: exit status $status after $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
    return $status
}
