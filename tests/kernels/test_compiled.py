"""Every kernel compiles for the GPUs that the project names, on a machine without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FUSED = list((Path(__file__).parents[2] / "kernels").glob("*/fused.py"))


@pytest.mark.parametrize("capability", ["90"])
def test_kernels_compile_and_spill_no_registers(capability: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_for_gpu.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script), capability], capture_output=True, text=True, check=False,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {k["kernel"].split(".")[0] for k in kernels} == {path.parent.name for path in FUSED}
    assert [k for k in kernels if k["LOCAL"] or k["STACK"]] == []
    # 65,536 registers of a multiprocessor are then enough for ten warps, whose reads are under way by themselves
    assert [k for k in kernels if k["REG"] > 200] == []
    # what passes over a volume reads 16 bytes a thread at a time, in one of the two layouts at least
    wide = {k["kernel"] for k in kernels if k["wide"]}
    passes = {k["kernel"] for k in kernels if not k["kernel"].split(".")[1].startswith(("_merge", "_finish", "_pack"))}
    # one's threads read where the warp leads, the other's a voxel of four channels
    assert passes - wide == {"augment._gather", "conv3d._folded"}
