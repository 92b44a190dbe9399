"""3x3x3 convolution in Triton: a program computes a row of the output along W from the nine rows around it.

cuDNN's tiles are made for many channels: with 16 it leaves most of a tensor core idle and reads each voxel 27 times.
Here each of the nine rows is read once and multiplied by the weights of all three voxels along W, so a product has
3 O columns; at the end the three parts are shifted by one voxel and added. With 4 channels a voxel and its two
neighbours, which lie together in memory, are 12 rows of the product instead, and nothing is shifted.

Legend of shapes: I channels in, O channels out, D H W voxels, kd kh kw the place in the kernel along them.
"""

import torch
import triton
import triton.language as tl

FOLDED = 4  # channels in, whose neighbours along W are read as channels
PAIRED = 16  # channels in and out, up to which a program takes two rows


@triton.jit
def _pack(weight, packed, SIZE, o, i, kd, kh, kw, IN: tl.constexpr, OUT: tl.constexpr, FLIP: tl.constexpr,
          FOLD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Weights as products take them, zeros where kw is 3: (kd,kh,I,kw,O), or (kd,kh,kw,I,O) where folded."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = at % OUT
    if FOLD:
        c, w = at // OUT % IN, at // (OUT * IN) % 4
    else:
        w, c = at // OUT % 4, at // (OUT * 4) % IN
    kdh = at // (OUT * IN * 4)
    used = (at < SIZE) & (w < 3)
    if FLIP:
        kdh, w = 8 - kdh, 2 - w
    value = tl.load(weight + n * o + c * i + kdh // 3 * kd + kdh % 3 * kh + w * kw, mask=used, other=0.0)
    tl.store(packed + at, value.to(packed.dtype.element_ty), mask=at < SIZE)


def pack(weight: torch.Tensor, dtype: torch.dtype, *, backward: bool = False) -> torch.Tensor:
    """Weights (O,I,3,3,3) for `convolve`; with `backward` turned round, for the gradient of its input."""
    o, i, *sides = weight.stride()
    channels_out, channels = weight.shape[:2]
    if backward:
        o, i, channels_out, channels = i, o, channels, channels_out
    packed = torch.empty((9, channels, 4, channels_out), dtype=dtype, device=weight.device)
    _pack[(triton.cdiv(packed.numel(), 1024),)](
        weight, packed, packed.numel(), o, i, *sides, IN=channels, OUT=channels_out, FLIP=backward,
        FOLD=channels == FOLDED, BLOCK=1024,
    )  # fmt: skip
    return packed


@triton.jit
def _folded(x, packed, y, D, H, W, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """A row of the output; columns of a tile are (kw,I)."""
    row = tl.program_id(0)
    h, d = row % H, row // H % D
    w, n, q = tl.arange(0, BLOCK), tl.arange(0, OUT), tl.arange(0, 4 * IN)
    beside = w[:, None] + (q // IN)[None, :] - 1
    inside = (beside >= 0) & (beside < W) & (q < 3 * IN)[None, :]
    offset = (w * IN)[:, None] + q[None, :] - IN
    total = tl.zeros([BLOCK, OUT], tl.float32)
    for kdh in tl.range(0, 9, num_stages=STAGES):
        kd, kh = kdh // 3 - 1, kdh % 3 - 1
        there = (d + kd >= 0) & (d + kd < D) & (h + kh >= 0) & (h + kh < H)
        start = (row + kd * H + kh).to(tl.int64) * W * IN
        tile = tl.load(x + start + offset, mask=inside & there, other=0.0)
        total = tl.dot(tile, tl.load(packed + (kdh * 4 * IN + q[:, None]) * OUT + n[None, :]), total)
    at = row.to(tl.int64) * W * OUT + (w * OUT)[:, None] + n[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(w < W)[:, None])


@triton.jit
def _thirds(part, OUT: tl.constexpr):
    """Columns of kw = 0, 1, 2 of [32, 4 O]."""
    even, odd = tl.split(tl.permute(tl.reshape(part, [32, 2, 2, OUT]), (0, 3, 1, 2)))
    left, right = tl.split(even)
    middle, _ = tl.split(odd)
    return left, middle, right


@triton.jit
def _bands(total, BLOCK: tl.constexpr, N: tl.constexpr):
    """Four bands [32, N] of a tile of 128 rows in `_order`, two (twice) of 64: every thread holds its part of each."""
    if BLOCK == 128:
        apart = tl.permute(tl.reshape(total, [2, 4, 2, 8, N]), (1, 3, 4, 0, 2))
        even, odd = tl.split(tl.reshape(apart, [32, N, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
    else:
        apart = tl.permute(tl.reshape(total, [4, 2, 8, N]), (0, 2, 3, 1))
        first, second = tl.split(tl.reshape(apart, [32, N, 2]))
        third, fourth = first, second
    return first, second, third, fourth


@triton.jit
def _band(y, left, middle, right, left_before, right_after, band: tl.constexpr, W, OUT: tl.constexpr):
    """Store voxels of 32 `band` on: left[w - 1] + middle[w] + right[w + 1]; given turned by a voxel, those at the ends
    come from the neighbouring bands.
    """
    here, n = tl.arange(0, 32), tl.arange(0, OUT)
    value = middle + tl.where(here[:, None] > 0, left, left_before) + tl.where(here[:, None] < 31, right, right_after)
    w = 32 * band + here
    tl.store(y + (w * OUT)[:, None] + n[None, :], value.to(y.dtype.element_ty), mask=(w < W)[:, None])


@triton.jit
def _turned(part, OUT: tl.constexpr):
    """left, middle and right of a band, each turned to the voxel that it goes to."""
    left, middle, right = _thirds(part, OUT)
    here = tl.broadcast_to(tl.arange(0, 32)[:, None], [32, OUT])
    return tl.gather(left, (here + 31) % 32, 0), middle, tl.gather(right, (here + 1) % 32, 0)


@triton.jit
def _shift_and_store(y, total, W, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """y[w] = left[w - 1] + middle[w] + right[w + 1]; voxels from W on are zeros in all."""
    first, second, third, fourth = _bands(total, BLOCK, 4 * OUT)
    none = tl.zeros([32, OUT], tl.float32)
    left0, middle0, right0 = _turned(first, OUT)
    left1, middle1, right1 = _turned(second, OUT)
    _band(y, left0, middle0, right0, none, right1, 0, W, OUT)
    if BLOCK == 128:
        left2, middle2, right2 = _turned(third, OUT)
        left3, middle3, right3 = _turned(fourth, OUT)
        _band(y, left1, middle1, right1, left0, right2, 1, W, OUT)
        _band(y, left2, middle2, right2, left1, right3, 2, W, OUT)
        _band(y, left3, middle3, right3, left2, none, 3, W, OUT)
    else:
        _band(y, left1, middle1, right1, left0, none, 1, W, OUT)


@triton.jit
def _order(BLOCK: tl.constexpr):
    """Voxels of a tile's rows, so that each thread of a warp group holds the same place of all bands."""
    p = tl.arange(0, BLOCK)
    return p // 64 * 64 + p // 8 % 2 * 32 + p // 16 % 4 * 8 + p % 8


@triton.jit
def _tile(x, row, offset, inside, there, WHOLE: tl.constexpr):
    """A row of the input, zeros where it is not there."""
    mask = there if WHOLE else inside & there
    return tl.load(x + row + offset, mask=mask, other=0.0)


@triton.jit
def _row(x, packed, y, D, H, W, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
         STAGES: tl.constexpr):  # fmt: skip
    """A row of the output from nine of the input."""
    row = tl.program_id(0)
    h, d = row % H, row // H % D
    w, c, n = _order(BLOCK), tl.arange(0, IN), tl.arange(0, 4 * OUT)
    inside = (w < W)[:, None] & (c >= 0)[None, :]
    offset = (w * IN)[:, None] + c[None, :]
    total = tl.zeros([BLOCK, 4 * OUT], tl.float32)
    for kdh in tl.range(0, 9, num_stages=STAGES):
        kd, kh = kdh // 3 - 1, kdh % 3 - 1
        there = (d + kd >= 0) & (d + kd < D) & (h + kh >= 0) & (h + kh < H)
        tile = _tile(x, (row + kd * H + kh).to(tl.int64) * W * IN, offset, inside, there, WHOLE)
        total = tl.dot(tile, tl.load(packed + (kdh * IN + c[:, None]) * 4 * OUT + n[None, :]), total)
    _shift_and_store(y + row.to(tl.int64) * W * OUT, total, W, OUT, BLOCK)


@triton.jit
def _pair(x, packed, y, D, H, W, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
          STAGES: tl.constexpr):  # fmt: skip
    """Two rows of the output from twelve of the input, so rows and weights are read fewer times."""
    half = tl.cdiv(H, 2)
    h = tl.program_id(0) % half * 2
    plane = tl.program_id(0) // half
    d = plane % D
    w, c, n = _order(BLOCK), tl.arange(0, IN), tl.arange(0, 4 * OUT)
    inside = (w < W)[:, None] & (c >= 0)[None, :]
    offset = (w * IN)[:, None] + c[None, :]
    weights = packed + c[:, None] * 4 * OUT + n[None, :]
    size: tl.constexpr = 4 * IN * OUT
    upper = tl.zeros([BLOCK, 4 * OUT], tl.float32)
    lower = tl.zeros([BLOCK, 4 * OUT], tl.float32)
    step = tl.cast(W, tl.int64) * IN
    for k in tl.range(0, 3, num_stages=STAGES):
        there = (d + k >= 1) & (d + k <= D)
        row = (tl.cast(plane + k - 1, tl.int64) * H + h) * step
        above = _tile(x, row - step, offset, inside, there & (h > 0), WHOLE)
        first = _tile(x, row, offset, inside, there, WHOLE)
        second = _tile(x, row + step, offset, inside, there & (h + 1 < H), WHOLE)
        below = _tile(x, row + 2 * step, offset, inside, there & (h + 2 < H), WHOLE)
        at = weights + 3 * k * size
        top, middle, bottom = tl.load(at), tl.load(at + size), tl.load(at + 2 * size)
        upper = tl.dot(above, top, upper)
        lower = tl.dot(first, top, lower)
        upper = tl.dot(first, middle, upper)
        lower = tl.dot(second, middle, lower)
        upper = tl.dot(second, bottom, upper)
        lower = tl.dot(below, bottom, lower)
    out = y + (tl.cast(plane, tl.int64) * H + h) * W * OUT
    _shift_and_store(out, upper, W, OUT, BLOCK)
    if h + 1 < H:
        _shift_and_store(out + W * OUT, lower, W, OUT, BLOCK)


def convolve(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """x (B,I,D,H,W) with channels last, packed weights: y (B,O,D,H,W)."""
    b, i, d, h, w = x.shape
    o = packed.shape[3]
    y = torch.empty((b, o, d, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    block = max(64, triton.next_power_of_2(w))
    if i == FOLDED:
        _folded[(b * d * h,)](x, packed, y, d, h, w, IN=i, OUT=o, BLOCK=block, STAGES=2, num_warps=2)
    elif max(i, o) <= PAIRED:
        _pair[(b * d * triton.cdiv(h, 2),)](
            x, packed, y, d, h, w, IN=i, OUT=o, BLOCK=block, WHOLE=block == w, STAGES=3, num_warps=4
        )
    else:
        _row[(b * d * h,)](x, packed, y, d, h, w, IN=i, OUT=o, BLOCK=block, WHOLE=block == w, STAGES=3, num_warps=4)
    return y
