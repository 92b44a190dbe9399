#!/usr/bin/env bash
# Sets up and passes the tests. Arguments go to pytest, such as `bash tests/run.sh -k cache`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=slurm/env.sh
. "$here/../slurm/env.sh"
root=$(medtrain_root)
export MEDTRAIN_EXTRAS=test
MEDTRAIN_UPGRADE=1
medtrain_env "$root"
bash "$here/system/install_slurm.sh"
cd "$root"
ruff check . && ruff format --check .
mypy kernels medtrain medseg medcls launch slurm
# where the interpreter itself falls, at its very end too, the threads' places are printed
export PYTHONFAULTHANDLER=1
[ $# -eq 0 ] || exec python -m pytest "$@"
# what takes long waits for other programs, too, and is run alone
status=0
python -m pytest -n "${MEDTRAIN_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder -m "not slow" --durations=30 || status=$?
python -m pytest -m slow -rs --durations=15 || status=$?
exit $status
