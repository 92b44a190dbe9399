"""1x1x1 convolution in Triton, for channels that are no multiple of eight: cuDNN pads such tensors by a copy first.

Legend of shapes: I channels in, O channels out, V voxels of all samples, P parts.
"""

import torch
import triton
import triton.language as tl

BLOCK = 256  # voxels that a program holds at once
PARTS = 528
WARPS = 4


@triton.jit
def _product(x, weight, bias, y, V, i, o, IN: tl.constexpr, OUT: tl.constexpr, WIDE_I: tl.constexpr,
             WIDE_O: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """y = x w + b of some voxels."""
    v = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c, n = tl.arange(0, WIDE_I), tl.arange(0, WIDE_O)
    there = (v < V)[:, None]
    value = tl.load(x + (v * IN)[:, None] + c[None, :], mask=there & (c < IN)[None, :], other=0.0)
    used = (c < IN)[:, None] & (n < OUT)[None, :]
    factor = tl.load(weight + (c * i)[:, None] + (n * o)[None, :], mask=used, other=0.0).to(x.dtype.element_ty)
    total = tl.dot(value, factor)
    if BIAS:
        total += tl.load(bias + n, mask=n < OUT, other=0.0).to(x.dtype.element_ty).to(tl.float32)[None, :]
    tl.store(y + (v * OUT)[:, None] + n[None, :], total.to(y.dtype.element_ty), mask=there & (n < OUT)[None, :])


@triton.jit
def _sums(x, dy, parts, V, each, IN: tl.constexpr, OUT: tl.constexpr, WIDE_I: tl.constexpr, WIDE_O: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """x' dy over the voxels of one part; a column of ones beside x gives the sum of dy, which the bias needs."""
    part = tl.program_id(0)
    c, n = tl.arange(0, WIDE_I), tl.arange(0, WIDE_O)
    total = tl.zeros([WIDE_I, WIDE_O], tl.float32)
    for start in range(part * each, tl.minimum(part * each + each, V), BLOCK):
        v = (start + tl.arange(0, BLOCK)).to(tl.int64)
        there = (v < V)[:, None]
        value = tl.load(x + (v * IN)[:, None] + c[None, :], mask=there & (c < IN)[None, :], other=0.0)
        value = tl.where(there & (c == IN)[None, :], 1.0, value.to(tl.float32)).to(x.dtype.element_ty)
        gradient = tl.load(dy + (v * OUT)[:, None] + n[None, :], mask=there & (n < OUT)[None, :], other=0.0)
        total = tl.dot(tl.trans(value), gradient, total)
    tl.store(parts + part * WIDE_I * WIDE_O + c[:, None] * WIDE_O + n[None, :], total)


@triton.jit
def _collect(parts, dweight, dbias, P, o, i, IN: tl.constexpr, OUT: tl.constexpr, WIDE_I: tl.constexpr,
             WIDE_O: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One channel of x, or the ones: add the parts in order and put the sums into their places."""
    c, n, p = tl.program_id(0), tl.arange(0, WIDE_O), tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, WIDE_O], tl.float32)
    for start in range(0, P, BLOCK):
        at = ((start + p) * WIDE_I + c)[:, None] * WIDE_O + n[None, :]
        total += tl.load(parts + at, mask=(start + p < P)[:, None] & (n >= 0)[None, :], other=0.0)
    sums = tl.sum(total, 0)
    if c < IN:
        tl.store(dweight + n * o + c * i, sums.to(dweight.dtype.element_ty), mask=n < OUT)
    elif BIAS:
        tl.store(dbias + n, sums.to(dbias.dtype.element_ty), mask=n < OUT)


def _wide(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *,
             backward: bool = False) -> torch.Tensor:  # fmt: skip
    """x (B,I,D,H,W) with channels last and weights (O,I,1,1,1): y (B,O,D,H,W); with `backward` dy to dx."""
    o, i = weight.stride()[:2]
    channels_out, channels = weight.shape[:2]
    if backward:
        o, i, channels_out, channels = i, o, channels, channels_out
    y = torch.empty((x.shape[0], channels_out, *x.shape[2:]), dtype=x.dtype, device=x.device,
                    memory_format=torch.channels_last_3d)  # fmt: skip
    voxels = x.numel() // channels
    _product[(triton.cdiv(voxels, BLOCK),)](
        x, weight, weight if bias is None else bias, y, voxels, i, o, IN=channels, OUT=channels_out,
        WIDE_I=_wide(channels), WIDE_O=_wide(channels_out), BIAS=bias is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return y


def gradients(x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor,
              bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of weights (O,I,1,1,1) and bias; that of no bias is empty."""
    o, i = weight.shape[:2]
    voxels = x.numel() // i
    each = triton.cdiv(triton.cdiv(voxels, PARTS), BLOCK) * BLOCK
    count = triton.cdiv(voxels, each)
    wide_i, wide_o = _wide(i + 1), _wide(o)
    parts = torch.empty((count, wide_i, wide_o), dtype=torch.float32, device=x.device)
    _sums[(count,)](x, dy, parts, voxels, each, IN=i, OUT=o, WIDE_I=wide_i, WIDE_O=wide_o, BLOCK=BLOCK, num_warps=WARPS)
    dweight = torch.empty_like(weight)
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    _collect[(i + 1,)](
        parts, dweight, dbias, count, *dweight.stride()[:2], IN=i, OUT=o, WIDE_I=wide_i, WIDE_O=wide_o,
        BIAS=bias is not None, BLOCK=64,
    )  # fmt: skip
    return dweight, dbias
