#!/usr/bin/env bash
# Cancer classification: folders of images -> cache -> four networks a cancer -> ensembles -> tables.
#
#   bash slurm/multicancer.sh                      phantom images, demo size, on this machine
#   bash slurm/multicancer.sh --data DIR --out DIR your Multi Cancer folder, full size
#   sbatch slurm/multicancer.sh --data DIR --out DIR  submits every part to SLURM, follows them to the table
#
# Further options go to launch/sweep.py, such as --set train.epochs=30. DATA, OUT and CLUSTER (a name in
# ~/.config/medtrain/clusters.toml) may also come from the environment. --sweep multicancer_demo takes the demo size.
#SBATCH --job-name=medtrain-multicancer
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=3G
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --output=medtrain-multicancer-%j.log
#SBATCH --open-mode=append
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
if [ ! -f "$here/env.sh" ]; then # sbatch runs a copy from its spool folder
    here=$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\(.*\.sh\).*/\1/p')")
    export MEDTRAIN_BATCH=1
fi
# shellcheck source=slurm/env.sh
. "$here/env.sh"
medtrain_sweep "$here/multicancer.sh" multicancer multicancer_demo phantom-images runs/phantom_images "$@"
