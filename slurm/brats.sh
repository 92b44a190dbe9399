#!/usr/bin/env bash
# Brain tumours, the main job: MRI files -> cache -> SegResNet and UNETR -> ensemble -> table.
#
#   bash slurm/brats.sh                            phantom data, demo size, on this machine
#   bash slurm/brats.sh --data DIR --out DIR       your MSD Task01 folder, published size
#   sbatch slurm/brats.sh                          the same as a batch job
#
# Further options go to launch/sweep.py, such as --set train.epochs=100. DATA and OUT may also come from the
# environment. --sweep brats_demo takes the demo size on your own data.
#SBATCH --job-name=medtrain-brats
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --mem=64G
#SBATCH --time=48:00:00
#SBATCH --output=medtrain-brats-%j.log
#SBATCH --open-mode=append
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
[ -f "$here/env.sh" ] || here=${SLURM_SUBMIT_DIR:?run it from the checkout}/slurm
# shellcheck source=slurm/env.sh
. "$here/env.sh"
medtrain_sweep "$here/brats.sh" brats brats_demo phantom runs/phantoms "$@"
