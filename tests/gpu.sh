#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: checks first, then measurements. Fails loudly without a GPU.
#   bash tests/gpu.sh                    all parts
#   bash tests/gpu.sh checks kernels     only these parts
# PYTHON=... names another interpreter than the project's own. PART_S (300) is the most seconds that a part may take.
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
if ! "$PYTHON" -c 'import medkernels, medlaunch, medslurm' 2>/dev/null; then # another interpreter than the project's own
    links=$(mktemp -d)
    trap 'rm -rf "$links"' EXIT
    for name in medtrain medseg medcls; do ln -s "$root/$name" "$links/$name"; done
    for name in kernels launch slurm; do ln -s "$root/$name" "$links/med$name"; done
    export PYTHONPATH="$links${PYTHONPATH:+:$PYTHONPATH}"
fi
"$PYTHON" - <<'PY'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("error: torch sees no CUDA device here: run tests/gpu.sh on a machine with a GPU.")
print(torch.cuda.get_device_name(), torch.__version__, torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
PY

cores=
measure() { $cores timeout "${PART_S:-300}" "$PYTHON" "$@"; }

# every test of a kernel and of networks with kernels, on the device: without CUDA these would run in triton's
# interpreter. Compilation takes a core a kernel; test_compiled.py needs no GPU.
check() {
    local status=0 crowd=()
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then crowd=(-n "$(($(nproc) < 12 ? $(nproc) : 12))"); fi
    measure -m pytest "${crowd[@]}" --ignore=tests/kernels/test_compiled.py tests/kernels tests/medseg/test_models.py \
        tests/medseg/test_infer.py tests/medtrain/test_graphs.py || status=1
    if "$PYTHON" -c 'import nvidia.dali' 2>/dev/null; then
        measure -m pytest -m gpu tests/medseg tests/medcls || status=1
    else
        echo "DALI is not installed: its checks are left out."
    fi
    return $status
}

# what the parts `kernels`, `step` and `networks` compile, beside the checks, which measure nothing: each in a process of
# its own
warm_up() {
    local rival kernel
    if [[ " $* " == *" step "* ]]; then
        for rival in "MONAI torch.compile" "MONAI torch.compile, CUDA graphs" "fused, torch.compile"; do
            measure tests/bench/gpu_step.py --warm "$rival" &
        done
    fi
    if [[ " $* " == *" kernels "* ]]; then
        for kernel in kernels/*/bench.py; do
            measure tests/bench/gpu_kernels.py --warm "$(basename "$(dirname "$kernel")")" &
        done
    fi
    if [[ " $* " == *" networks "* ]]; then
        measure tests/bench/gpu_networks.py --warm & # one after the other: at full size they would fill the card
    fi
    wait
}

run_part() {
    case $1 in
        checks) check ;;
        kernels) measure tests/bench/gpu_kernels.py ;;
        step) measure tests/bench/gpu_step.py ;;
        training) measure tests/bench/gpu_training.py && cores="taskset -c 0,1" measure tests/bench/gpu_training.py ;;
        networks) measure tests/bench/gpu_networks.py ;;
        inference) measure tests/bench/gpu_inference.py ;;
        overhead) measure tests/bench/engine_overhead.py --record ;;
        memory) measure tests/bench/memory_plan.py --record ;;
        images) measure tests/bench/gpu_images.py ;;
    esac
}

[ $# -gt 0 ] || set -- "${parts[@]}"
failed=()
warm_up "$@" >/dev/null 2>&1 &
warming=$!
[ "$1" = checks ] || wait $warming
for part in "$@"; do
    began=$SECONDS
    status=0
    run_part "$part" || status=$?
    [ "$part" != checks ] || wait $warming || true
    if [ $status = 0 ]; then
        echo "$part: $((SECONDS - began)) s"
    else
        failed+=("$part") # the other parts are run all the same
    fi
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "error: failed: ${failed[*]}." >&2
    exit 1
fi
