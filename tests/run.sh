#!/usr/bin/env bash
# Sets up and passes the tests, whole runs and a real SLURM (tests/system) beside the others. Arguments go to pytest,
# which then runs once, such as `bash tests/run.sh -k cache`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=slurm/env.sh
. "$here/../slurm/env.sh"
root=$(medtrain_root)
export MEDTRAIN_EXTRAS=test
medtrain_env "$root"
bash "$here/system/install_slurm.sh"
cd "$root"
ruff check . && ruff format --check .
mypy kernels medtrain medseg medcls launch slurm
# where the interpreter itself falls, at its very end too, the threads' places are printed
export PYTHONFAULTHANDLER=1
[ $# -eq 0 ] || exec python -m pytest "$@"
export OMP_WAIT_POLICY=PASSIVE # threads that wait would else take the other half's cores
others=$(mktemp)
trap 'kill $! 2>/dev/null || true; rm -f "$others"' EXIT
python -m pytest tests --ignore tests/system >"$others" 2>&1 &
status=0
python -m pytest tests/system || status=$?
wait $! || status=$?
cat "$others"
exit $status
