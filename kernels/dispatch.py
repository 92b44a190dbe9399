"""Which implementation of a kernel runs, and why: the single place."""

import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Literal

import torch

Impl = Literal["auto", "reference", "fused"]
IMPLS: tuple[Impl, ...] = ("auto", "reference", "fused")
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)

# Read once, as triton itself does when a kernel is decorated.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_logger = logging.getLogger("medkernels")
_told: set[str] = set()
# Kernels that answered wrongly on this device, with the reason (see `medkernels.trial`).
distrusted: dict[str, str] = {}


class FusedUnavailable(RuntimeError):
    """`impl="fused"` was asked for where the fused kernel can not run."""


def device_refusal(device_type: str) -> str:
    """Why no fused kernel runs on a kind of device, or an empty text."""
    if not HAS_TRITON:
        return "triton is not installed"
    if device_type == "cpu":
        return "" if INTERPRETED else "tensors on the CPU need the interpreter (TRITON_INTERPRET=1)"
    if device_type != "cuda":
        return f"no kernel runs on {device_type} tensors"
    if INTERPRETED:
        return "TRITON_INTERPRET=1 is set, so kernels run on CPU tensors only"
    major, minor = torch.cuda.get_device_capability()
    # bfloat16 arithmetic needs 8.0
    return "" if major >= 8 else f"the device has compute capability {major}.{minor}, kernels need 8.0"


# What torch.compiler.assume_constant_result does; the call itself would import the compiler, for seconds, in every
# process (a test compares the two).
device_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def use_fused(kernel: str, impl: Impl, tensors: Sequence[torch.Tensor | None], refusal: str = "") -> bool:
    """Whether the fused kernel runs on these tensors; the first one names the device.

    `reference` never, `fused` always or FusedUnavailable (a RuntimeError) with the reason, `auto` on CUDA tensors where
    it can; a fall-back there is logged once per kernel and reason. On the CPU `auto` takes the reference silently: the
    interpreter is for tests. `refusal` is the kernel's own reason, such as an unsupported dtype. Raises ValueError for
    another `impl`.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, not {impl!r}")
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    if impl == "reference" or (impl == "auto" and device.type == "cpu"):
        return False
    if any(tensor.device != device for tensor in given):
        refusal = refusal or "the tensors lie on different devices"
    reason = device_refusal(device.type) or refusal or distrusted.get(kernel, "")
    if reason and impl == "fused":
        raise FusedUnavailable(f"{kernel}: the fused kernel can not run: {reason}")
    if reason:
        _tell(f"{kernel}: reference instead of fused: {reason}")
    return not reason


def distrust(kernel: str, reason: str) -> None:
    """Take a kernel's reference from now on, and say so."""
    distrusted[kernel] = reason
    _tell(f"{kernel}: reference instead of fused: {reason}")


def dtype_refusal(*tensors: torch.Tensor | None) -> str:
    """Why kernels for half and single precision do not take these tensors, or an empty text."""
    odd = [tensor.dtype for tensor in tensors if tensor is not None and tensor.dtype not in HALF_AND_SINGLE]
    return f"no kernel for {odd[0]}" if odd else ""


def _tell(message: str) -> None:
    if torch.compiler.is_compiling() or message in _told:
        return
    _told.add(message)
    _logger.warning(message)
