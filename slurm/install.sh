#!/usr/bin/env bash
# Makes the Python environment, once, where there is internet: on a cluster that is a login node.
#
#   bash slurm/install.sh
#   . .venv/bin/activate        in every new shell, before python launch/... and torchrun
#
# MEDTRAIN_VENV names another place for it; MEDTRAIN_EXTRAS=test,bench adds what tests and benchmarks need.
set -euo pipefail
# shellcheck source=slurm/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
case ${1:-} in
"") ;;
-h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
*) echo "error: install.sh takes no option $1: see its --help." >&2 && exit 2 ;;
esac
root=$(medtrain_root)
MEDTRAIN_UPGRADE=1
medtrain_env "$root"
python - <<'END'
import torch

gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(f"torch {torch.__version__}, GPUs here: {gpus or 'none'}")
END
echo "ready: . $VIRTUAL_ENV/bin/activate"
