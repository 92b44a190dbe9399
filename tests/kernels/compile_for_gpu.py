"""Compile every kernel for a GPU that is not there: `python compile_for_gpu.py 90` prints one JSON line a kernel.

Runs the operators on tensors of a recipe's kind with a driver that only names its target: triton compiles, with the
specialisations of a real launch, and launches nothing. Outputs are garbage.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NoDevice:
    """What triton asks of a driver before it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """The GPU to compile for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """The first device."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """The default stream."""
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack, shared and local bytes (of a thread or block) that a compiled kernel takes."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def main() -> None:
    """Compile all."""
    driver.set_active(NoDevice(int(sys.argv[1])))  # type: ignore[arg-type]
    launch, seen = JITFunction.run, set()

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            wide = any(read in kernel.asm["ptx"] for read in ("ld.global.v4", "cp.async.cg"))
            told = {"kernel": f"{self.module.split('.')[1]}.{self.__name__}", "wide": wide}
            print(json.dumps(told | resources(kernel.asm["cubin"])), flush=True)
        return kernel

    JITFunction.run = only_compile
    for layout in (torch.channels_last_3d, torch.contiguous_format):
        group_norm_relu(layout)
        region_dice(layout)
        upsample_add(layout)
    conv3d()
    window_accumulate()
    augment()


def group_norm_relu(layout: torch.memory_format) -> None:
    """The first and the last level of SegResNet, and a residual block's end."""
    from medkernels.group_norm_relu import fused

    for channels, side in ((16, 64), (128, 16)):
        x = torch.empty(2, channels, side, side, side, dtype=torch.bfloat16).contiguous(memory_format=layout)
        weight, bias = torch.ones(2, channels).requires_grad_()
        residual = torch.empty_like(x) if channels == 16 else None
        y = fused.group_norm_relu(x.requires_grad_(), 8, weight, bias, residual, 1e-5, 0.0)
        y.backward(torch.empty_like(y))
    # a deep level of UNETR: one channel a group, with a residual
    x, residual = (torch.empty(2, 128, 16, 16, 16, dtype=torch.bfloat16) for _ in range(2))
    y = fused.group_norm_relu(x.requires_grad_(), 128, None, None, residual, 1e-5, 0.01)
    y.backward(torch.empty_like(y))


def region_dice(layout: torch.memory_format) -> None:
    """The loss at 64 voxels a side."""
    from medkernels.region_dice import fused

    logits = torch.empty(2, 3, 64, 64, 64, dtype=torch.bfloat16).contiguous(memory_format=layout).requires_grad_()
    label = torch.empty(2, 64, 64, 64, dtype=torch.uint8)
    for squared, entropy in ((True, False), (True, True), (False, False)):
        fused.region_dice(logits, label, [[2, 3], [1, 2, 3], [3]], squared, squared, 0.0, 1e-5, entropy).backward()


def upsample_add(layout: torch.memory_format) -> None:
    """Into SegResNet's first and third level."""
    from medkernels.upsample_add import fused

    for channels, side in ((16, 32), (64, 16)):
        x, skip = (
            torch.empty(2, channels, n, n, n, dtype=torch.bfloat16).contiguous(memory_format=layout).requires_grad_()
            for n in (side, 2 * side)
        )
        y = fused.upsample_add(x, skip)
        y.backward(torch.empty_like(y))


def conv3d() -> None:
    """SegResNet's first and last convolution, those of two first levels, and a change of channels at a row of 128."""
    from medkernels.conv3d import fused

    for channels, channels_out, side, edge in ((4, 16, 3, 128), (16, 16, 3, 128), (32, 32, 3, 64), (32, 16, 3, 96),
                                               (16, 3, 1, 64)):  # fmt: skip
        size = (1, channels, 4, 6, edge)
        x = torch.empty(size, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last_3d)
        weight = torch.empty(channels_out, channels, side, side, side, requires_grad=True)
        bias = torch.empty(channels_out, requires_grad=True) if side == 1 else None
        y = fused.conv3d(x.requires_grad_(channels > 4), weight, bias)
        y.backward(torch.empty_like(y))


def window_accumulate() -> None:
    """Two windows of half precision."""
    from medkernels.window_accumulate import fused

    importance, weight, total = torch.empty(32, 32, 32), torch.empty(48, 48, 48), torch.empty(2, 3, 48, 48, 48)
    windows = torch.empty(2, 2, 3, 32, 32, 32, dtype=torch.bfloat16)
    fused.window_accumulate(total, weight, windows, [(0, 0, 0), (16, 16, 16)], importance)


def augment() -> None:
    """Two crops of four channels."""
    from medkernels.augment import fused

    image, label = torch.empty(4 * 64**3, dtype=torch.float16), torch.empty(64**3, dtype=torch.uint8)
    table = torch.zeros(2, 10, dtype=torch.int64)
    fused.augment(image, label, table, torch.empty(2, 23), 4, (32, 32, 32))


if __name__ == "__main__":
    main()
