#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: checks first, then measurements. Fails loudly without a GPU.
#   bash tests/gpu.sh                    all parts
#   bash tests/gpu.sh checks kernels     only these, where the card is lent for minutes
# PYTHON=... names another interpreter than the project's own.
set -euo pipefail
parts=(checks kernels step training networks inference overhead memory images)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for part in "$@"; do
    [[ " ${parts[*]} " == *" $part "* ]] || { echo "error: no part $part: choose from ${parts[*]}." >&2; exit 2; }
done
if [ -z "${PYTHON:-}" ]; then
    # shellcheck source=slurm/env.sh
    . "$root/slurm/env.sh"
    export MEDTRAIN_EXTRAS=test
    medtrain_env "$root"
    PYTHON=python
fi
cd "$root"
"$PYTHON" - <<'PY'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("error: torch sees no CUDA device here: run tests/gpu.sh on a machine with a GPU.")
print(torch.cuda.get_device_name(), torch.__version__, torch.version.cuda)
PY

run_part() {
    case $1 in
        checks)
            # every test of a kernel and of networks with kernels, on the device: without CUDA these would run in
            # triton's interpreter
            "$PYTHON" -m pytest -m gpu tests && "$PYTHON" -m pytest tests/kernels tests/medseg/test_models.py
            ;;
        kernels) "$PYTHON" tests/bench/gpu_kernels.py ;;
        step) "$PYTHON" tests/bench/gpu_step.py ;;
        training)
            "$PYTHON" tests/bench/gpu_training.py && taskset -c 0,1 "$PYTHON" tests/bench/gpu_training.py
            ;;
        networks) "$PYTHON" tests/bench/gpu_networks.py ;;
        inference) "$PYTHON" tests/bench/gpu_inference.py ;;
        overhead) "$PYTHON" tests/bench/engine_overhead.py --record ;;
        memory) "$PYTHON" tests/bench/memory_plan.py --record ;;
        images) "$PYTHON" tests/bench/gpu_images.py ;;
    esac
}

[ $# -gt 0 ] || set -- "${parts[@]}"
failed=()
for part in "$@"; do
    began=$SECONDS
    if run_part "$part"; then
        echo "$part: $((SECONDS - began)) s"
    else
        failed+=("$part") # the card is rare: the other parts are run all the same
    fi
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "error: failed: ${failed[*]}." >&2
    exit 1
fi
