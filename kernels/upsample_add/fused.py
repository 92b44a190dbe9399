"""Trilinear doubling and addition in Triton; both directions gather.

A program computes a tile of H by W by C elements at one depth of one sample: rows of one channel where channels come
first, a run of voxels with all their channels where they come last.

Legend of shapes: B batch, C channels, d h w voxels before, D H W voxels after.
"""

# ruff: noqa: SIM300 - D, H and W are no constants
import torch
import triton
import triton.language as tl

from medkernels.layout import dense, like

TILE = 1024  # elements that a program computes, 8 a thread: with 16 the backward pass spills registers
WARPS = 4


def _plan(size: torch.Size, channels_last: bool) -> tuple[dict[str, int], tuple[int, int, int]]:
    """Block sides and grid for an output (B,C,D,H,W)."""
    b, c, d, h, w = size
    if channels_last:
        block_c, block_h = min(128, triton.next_power_of_2(c)), 1
        block_w = min(TILE // block_c, triton.next_power_of_2(w))
    else:
        block_w = min(128, triton.next_power_of_2(w))
        block_h = min(TILE // block_w, triton.next_power_of_2(h))
        block_c = min(TILE // block_w // block_h, triton.next_power_of_2(c))  # several only where planes are small
    blocks = {"BLOCK_H": block_h, "BLOCK_W": block_w, "BLOCK_C": block_c, "num_warps": WARPS}
    return blocks, (triton.cdiv(h, block_h) * triton.cdiv(w, block_w) * d, triton.cdiv(c, block_c), b)


def _strides(x: torch.Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor from its shape, so that those of axes of length one are what kernels expect."""
    _, c, d, h, w = x.shape
    if x.is_contiguous():
        return c * d * h * w, d * h * w, h * w, w, 1
    return c * d * h * w, 1, h * w * c, w * c, c


@triton.jit
def _place(H, W, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Depth, rows, columns and channels of this program's tile."""
    across, down = tl.cdiv(W, BLOCK_W), tl.cdiv(H, BLOCK_H)
    tile = tl.program_id(0)
    w = (tile % across) * BLOCK_W + tl.arange(0, BLOCK_W)
    h = (tile // across % down) * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return tile // across // down, h[:, None, None], w[None, :, None], c[None, None, :]


@triton.jit
def _other(at, size):
    """The second voxel that an output lies between, one further to its own side; the edge's is itself."""
    return tl.minimum(tl.maximum(at // 2 + (at % 2) * 2 - 1, 0), size - 1)


@triton.jit
def _add(x, skip, y, C, d, h, w, xb, xc, xd, xh, xw, yb, yc, yd, yh, yw,
         BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Forward: eight voxels, weights 27, 9, 3 and 1 of 64."""
    b = tl.program_id(2).to(tl.int64)
    D, H, W, c = _place(2 * h, 2 * w, BLOCK_H, BLOCK_W, BLOCK_C)
    inside = (H < 2 * h) & (W < 2 * w) & (c < C)
    total = tl.zeros([BLOCK_H, BLOCK_W, BLOCK_C], tl.float32)
    base = x + b * xb + c.to(tl.int64) * xc
    for i in tl.static_range(2):
        depth = (D // 2 if i == 0 else _other(D, d)).to(tl.int64) * xd
        for j in tl.static_range(2):
            row = (H // 2 if j == 0 else _other(H, h)) * xh
            for k in tl.static_range(2):
                column = (W // 2 if k == 0 else _other(W, w)) * xw
                weight = (0.75 if i == 0 else 0.25) * (0.75 if j == 0 else 0.25) * (0.75 if k == 0 else 0.25)
                total += weight * tl.load(base + depth + (row + column), mask=inside, other=0.0).to(tl.float32)
    at = b * yb + c.to(tl.int64) * yc + D.to(tl.int64) * yd + (H * yh + W * yw)
    total += tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _taps(at, size):
    """The four outputs along an axis that a voxel went into, and its weights there: an edge takes what clamping gave
    it, and nothing from beyond."""
    first, last = at == 0, at == size - 1
    outputs = (tl.maximum(2 * at - 1, 0), 2 * at, 2 * at + 1, tl.minimum(2 * at + 2, 2 * size - 1))
    weights = (
        tl.where(first, 0.0, 0.25), tl.where(first, 1.0, 0.75),
        tl.where(last, 1.0, 0.75), tl.where(last, 0.0, 0.25),
    )  # fmt: skip
    return outputs, weights


@triton.jit
def _gather(dy, dx, C, d, h, w, xb, xc, xd, xh, xw, yb, yc, yd, yh, yw,
            BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Backward: each voxel of x collects the outputs that it went into, four along each axis."""
    b = tl.program_id(2).to(tl.int64)
    D, H, W, c = _place(h, w, BLOCK_H, BLOCK_W, BLOCK_C)
    inside = (H < h) & (W < w) & (c < C)
    total = tl.zeros([BLOCK_H, BLOCK_W, BLOCK_C], tl.float32)
    base = dy + b * yb + c.to(tl.int64) * yc
    columns, wide = _taps(W, w)
    # not unrolled: 64 loads in flight, or their 64 offsets and weights, would take all registers
    for step in range(16):
        i, j = step // 4, step % 4
        depth = base + tl.minimum(tl.maximum(2 * D + i - 1, 0), 2 * d - 1).to(tl.int64) * yd
        row = tl.minimum(tl.maximum(2 * H + j - 1, 0), 2 * h - 1) * yh
        deep = tl.where(tl.where(i < 2, D == 0, D == d - 1), 1.0, 0.75)
        high = tl.where(tl.where(j < 2, H == 0, H == h - 1), 1.0, 0.75)
        # the outer two of the four have what the inner two leave
        weight = tl.where(i % 3 == 0, 1.0 - deep, deep) * tl.where(j % 3 == 0, 1.0 - high, high)
        for k in tl.static_range(4):
            value = tl.load(depth + (row + columns[k] * yw), mask=inside, other=0.0).to(tl.float32)
            total += weight * wide[k] * value
    at = b * xb + c.to(tl.int64) * xc + D.to(tl.int64) * xd + (H * xh + W * xw)
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside)


@torch.library.custom_op("medkernels::upsample_add", mutates_args=())
def _forward(x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    skip = dense(skip)
    x = like(x, skip)
    y = torch.empty_like(skip)
    blocks, grid = _plan(y.shape, not skip.is_contiguous())
    _add[grid](x, skip, y, *x.shape[1:], *_strides(x), *_strides(y), **blocks)
    return y


@_forward.register_fake
def _(x, skip):
    return torch.empty_like(dense(skip))


@torch.library.custom_op("medkernels::upsample_add_backward", mutates_args=())
def _backward(dy: torch.Tensor) -> torch.Tensor:
    dy = dense(dy)
    dx = _half(dy)
    blocks, grid = _plan(dx.shape, not dy.is_contiguous())
    _gather[grid](dy, dx, *dx.shape[1:], *_strides(dx), *_strides(dy), **blocks)
    return dx


@_backward.register_fake
def _(dy):
    return _half(dense(dy))


def _half(dy: torch.Tensor) -> torch.Tensor:
    """An empty tensor with sides halved, in the same layout."""
    b, c, d, h, w = dy.shape
    last = torch.contiguous_format if dy.is_contiguous() else torch.channels_last_3d
    return torch.empty((b, c, d // 2, h // 2, w // 2), dtype=dy.dtype, device=dy.device, memory_format=last)


def _save(ctx, inputs, output) -> None:
    pass  # the gradient is linear in dy: nothing is kept


def _differentiate(ctx, dy):
    return _backward(dy), dy


_forward.register_autograd(_differentiate, setup_context=_save)


def upsample_add(x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """See `medkernels.upsample_add`."""
    return _forward(x, skip)
