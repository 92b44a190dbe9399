#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: checks first, then measurements. Fails loudly without a GPU.
#   bash tests/gpu.sh            PYTHON=... names another interpreter than the project's own
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
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
"$PYTHON" -m pytest -m gpu tests
# every test of a kernel, on the device: without CUDA these would run in triton's interpreter
"$PYTHON" -m pytest tests/kernels
"$PYTHON" tests/bench/gpu_kernels.py
"$PYTHON" tests/bench/gpu_step.py
"$PYTHON" tests/bench/gpu_networks.py
"$PYTHON" tests/bench/gpu_inference.py
"$PYTHON" tests/bench/engine_overhead.py --record
"$PYTHON" tests/bench/memory_plan.py --record
"$PYTHON" tests/bench/gpu_training.py "$@"
taskset -c 0,1 "$PYTHON" tests/bench/gpu_training.py "$@"
"$PYTHON" tests/bench/gpu_images.py
