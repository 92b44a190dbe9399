#!/usr/bin/env bash
# Cancer classification: folders of images -> cache -> four networks a cancer -> ensembles -> tables.
#
#   bash slurm/multicancer.sh                      phantom images, demo size, on this machine
#   bash slurm/multicancer.sh --data DIR --out DIR your Multi Cancer folder, full size
#   sbatch slurm/multicancer.sh                    the same as a batch job
#
# Further options go to launch/sweep.py, such as --set train.epochs=30. DATA and OUT may also come from the
# environment. --sweep multicancer_demo takes the demo size on your own data.
#SBATCH --job-name=medtrain-multicancer
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --mem=64G
#SBATCH --time=48:00:00
#SBATCH --output=medtrain-multicancer-%j.log
#SBATCH --open-mode=append
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
[ -f "$here/env.sh" ] || here=${SLURM_SUBMIT_DIR:?run it from the checkout}/slurm
# shellcheck source=slurm/env.sh
. "$here/env.sh"
medtrain_sweep "$here/multicancer.sh" multicancer multicancer_demo phantom-images runs/phantom_images "$@"
