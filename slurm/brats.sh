#!/usr/bin/env bash
# Brain tumours, the main job: MRI files -> cache -> SegResNet and UNETR -> ensemble -> table.
#
#   bash slurm/brats.sh                            phantom data, demo size, on this machine
#   bash slurm/brats.sh --data DIR --out DIR       your MSD Task01 folder, full size
#   sbatch slurm/brats.sh --data DIR --out DIR     submits every part to SLURM and follows them to the table
#
# Further options go to launch/sweep.py, such as --set train.epochs=100. DATA, OUT and CLUSTER (a name in
# ~/.config/medtrain/clusters.toml) may also come from the environment. --sweep brats_demo takes the demo size.
#SBATCH --job-name=medtrain-brats
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=3G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=medtrain-brats-%j.log
#SBATCH --open-mode=append
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
if [ ! -f "$here/env.sh" ]; then # sbatch runs a copy from its spool folder
    script=$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null | sed -n 's/^ *Command=//p') || script=
    for here in "${script%%/brats.sh*}" "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/slurm" ""; do
        [ ! -f "$here/env.sh" ] || break
    done
    [ -n "$here" ] || { echo "error: the checkout is not found: type sbatch in it." >&2 && exit 2; }
    export MEDTRAIN_BATCH=1
fi
# shellcheck source=slurm/env.sh
. "$here/env.sh"
medtrain_sweep "$here/brats.sh" brats brats_demo phantom runs/phantoms "$@"
