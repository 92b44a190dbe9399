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
root=$(medtrain_root)

data=${DATA:-} out=${OUT:-} sweep=brats rest=()
while [ $# -gt 0 ]; do
    case $1 in
    --data) data=${2:?--data needs a folder} && shift 2 ;;
    --out) out=${2:?--out needs a folder} && shift 2 ;;
    --data=*) data=${1#*=} && shift ;;
    --out=*) out=${1#*=} && shift ;;
    --sweep=*) sweep=${1#*=} && shift ;;
    --sweep) sweep=${2:?--sweep needs a name} && shift 2 ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$here/brats.sh" && exit 0 ;;
    *) rest+=("$1") && shift ;;
    esac
done
began=$SECONDS
medtrain_env "$root"
out=${out:-$root/runs/brats}
if [ -z "$data" ]; then
    data=$root/runs/phantoms
    sweep=brats_demo
    echo "no --data given: making phantoms in $data"
    python "$root/launch/prepare.py" phantom --out "$data"
fi
status=0
python "$root/launch/sweep.py" "$sweep" --data "$data" --out "$out" ${rest[@]+"${rest[@]}"} || status=$?
echo "brats.sh: exit status $status after $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
exit $status
