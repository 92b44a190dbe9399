"""1x1x1 convolution in Triton, for channels that are no multiple of eight: cuDNN pads such tensors by a copy first.

A few regions' logits come with channels first, as the loss and sliding windows read them.

Legend of shapes: I channels in, O channels out, V voxels of all samples, P parts.
"""

import torch
import triton
import triton.language as tl

from medkernels.layout import dense, strides_nsc

FEW = 4  # channels out, up to which they come first
BLOCK = 256  # voxels that a program holds at once
PARTS = 528
WARPS = 4


@triton.jit
def _places(start, V, S, stride_b, stride_s, BLOCK: tl.constexpr):
    """Where a run of voxels begins in memory, as a column, and whether they are there."""
    v = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
    return (v // S * stride_b + v % S * stride_s)[:, None], (v < V)[:, None]


@triton.jit
def _product(x, weight, bias, y, V, S, x_b, x_s, x_c, y_b, y_s, y_c, i, o, IN: tl.constexpr, OUT: tl.constexpr,
             WIDE_IN: tl.constexpr, WIDE_OUT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """y = x w + b of some voxels."""
    c, n = tl.arange(0, WIDE_IN), tl.arange(0, WIDE_OUT)
    at, there = _places(tl.program_id(0).to(tl.int64) * BLOCK, V, S, x_b, x_s, BLOCK)
    value = tl.load(x + at + (c * x_c)[None, :], mask=there & (c < IN)[None, :], other=0.0)
    used = (c < IN)[:, None] & (n < OUT)[None, :]
    factor = tl.load(weight + (c * i)[:, None] + (n * o)[None, :], mask=used, other=0.0).to(x.dtype.element_ty)
    total = tl.dot(value, factor)
    if BIAS:
        total += tl.load(bias + n, mask=n < OUT, other=0.0).to(x.dtype.element_ty).to(tl.float32)[None, :]
    at, _ = _places(tl.program_id(0).to(tl.int64) * BLOCK, V, S, y_b, y_s, BLOCK)
    tl.store(y + at + (n * y_c)[None, :], total.to(y.dtype.element_ty), mask=there & (n < OUT)[None, :])


@triton.jit
def _sums(x, dy, parts, V, S, each, x_b, x_s, x_c, y_b, y_s, y_c, IN: tl.constexpr, OUT: tl.constexpr,
          WIDE_IN: tl.constexpr, WIDE_OUT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """x' dy over the voxels of one part; a column of ones beside x gives the sum of dy, which the bias needs."""
    part = tl.program_id(0)
    c, n = tl.arange(0, WIDE_IN), tl.arange(0, WIDE_OUT)
    total = tl.zeros([WIDE_IN, WIDE_OUT], tl.float32)
    for start in range(part * each, tl.minimum(part * each + each, V), BLOCK):
        at, there = _places(start, V, S, x_b, x_s, BLOCK)
        value = tl.load(x + at + (c * x_c)[None, :], mask=there & (c < IN)[None, :], other=0.0)
        value = tl.where(there & (c == IN)[None, :], 1.0, value.to(tl.float32)).to(x.dtype.element_ty)
        at, _ = _places(start, V, S, y_b, y_s, BLOCK)
        gradient = tl.load(dy + at + (n * y_c)[None, :], mask=there & (n < OUT)[None, :], other=0.0)
        total = tl.dot(tl.trans(value), gradient, total)
    tl.store(parts + part * WIDE_IN * WIDE_OUT + c[:, None] * WIDE_OUT + n[None, :], total)


@triton.jit
def _collect(parts, dweight, dbias, P, o, i, IN: tl.constexpr, OUT: tl.constexpr, WIDE_IN: tl.constexpr,
             WIDE_OUT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One channel of x, or the ones: add the parts in order and put the sums into their places."""
    c, n, p = tl.program_id(0), tl.arange(0, WIDE_OUT), tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, WIDE_OUT], tl.float32)
    for start in range(0, P, BLOCK):
        at = ((start + p) * WIDE_IN + c)[:, None] * WIDE_OUT + n[None, :]
        total += tl.load(parts + at, mask=(start + p < P)[:, None] & (n >= 0)[None, :], other=0.0)
    sums = tl.sum(total, 0)
    if c < IN:
        tl.store(dweight + n * o + c * i, sums.to(dweight.dtype.element_ty), mask=n < OUT)
    elif BIAS:
        tl.store(dbias + n, sums.to(dbias.dtype.element_ty), mask=n < OUT)


def _wide(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def empty(x: torch.Tensor, channels: int) -> torch.Tensor:
    """The output of a convolution of x."""
    form = torch.contiguous_format if channels <= FEW else torch.channels_last_3d
    return torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=form)


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor,
              strides: tuple[int, int]) -> torch.Tensor:  # fmt: skip
    channels, channels_out, s = x.shape[1], y.shape[1], x[0, 0].numel()
    voxels = x.shape[0] * s
    _product[(triton.cdiv(voxels, BLOCK),)](
        x, weight, weight if bias is None else bias, y, voxels, s, *strides_nsc(x), *strides_nsc(y), *strides,
        IN=channels, OUT=channels_out, WIDE_IN=_wide(channels), WIDE_OUT=_wide(channels_out), BIAS=bias is not None,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return y


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (B,I,D,H,W) and weights (O,I,1,1,1): y (B,O,D,H,W), see `empty`."""
    o, i = weight.stride()[:2]
    return _multiply(x, weight, bias, empty(x, weight.shape[0]), (i, o))


def input_gradient(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dx, as x lies, from dy in any layout."""
    o, i = weight.stride()[:2]
    return _multiply(dense(dy), weight, None, torch.empty_like(x), (o, i))


def gradients(x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor,
              bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of weights (O,I,1,1,1) and bias; that of no bias is empty."""
    o, i = weight.shape[:2]
    dy, s = dense(dy), x[0, 0].numel()
    voxels = x.shape[0] * s
    each = triton.cdiv(triton.cdiv(voxels, PARTS), BLOCK) * BLOCK
    count = triton.cdiv(voxels, each)
    wide_i, wide_o = _wide(i + 1), _wide(o)
    parts = torch.empty((count, wide_i, wide_o), dtype=torch.float32, device=x.device)
    _sums[(count,)](
        x, dy, parts, voxels, s, each, *strides_nsc(x), *strides_nsc(dy), IN=i, OUT=o, WIDE_IN=wide_i, WIDE_OUT=wide_o,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    dweight = torch.empty_like(weight)
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    _collect[(i + 1,)](
        parts, dweight, dbias, count, *dweight.stride()[:2], IN=i, OUT=o, WIDE_IN=wide_i, WIDE_OUT=wide_o,
        BIAS=bias is not None, BLOCK=64,
    )  # fmt: skip
    return dweight, dbias
