"""In which type a device computes: what a recipe's precision means there."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from medtrain.errors import UserError
from medtrain.recipe import Recipe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


def precision_for(recipe: Recipe, device: torch.device) -> str:
    """`auto` is bf16 where the hardware computes it natively, else fp16 on a GPU and fp32 on a CPU. tf32 is fp32 whose
    products are rounded to 10 bits on the way into tensor cores; fp32 is never that.
    """
    wanted = recipe.train.precision
    if wanted in ("fp16", "tf32") and device.type == "cpu":
        raise UserError(f"train.precision={wanted} needs a GPU: take bf16, fp32 or auto.")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.backends.cpu.get_cpu_capability() == "AVX512" and _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


def autocasts(precision: str) -> bool:
    """Whether operations are computed in another type than the weights'."""
    return DTYPES[precision] != torch.float32


def autocast(precision: str, kind: str) -> AbstractContextManager[Any]:
    """The mixed-precision context of a forward pass on a kind of device; none where nothing is cast."""
    return torch.autocast(kind, DTYPES[precision]) if autocasts(precision) else nullcontext()


def allow_tf32(precision: str) -> None:
    """Let tensor cores round fp32 products where the precision is tf32, in convolutions too, and nowhere else."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
