"""The gradient of a 3x3x3 convolution's weights in Triton: products over voxels, in parts that are added in order.

A program goes through tiles of rows. The columns of a tile of x are (kh,I), those of dy (kw,O), each voxel's three
neighbours beside it; so a product of x's tile, transposed, with dy's is the sum over voxels of all nine places, of one
plane kd. With 4 channels x holds the neighbours along W, too: (kh,kw,I) by (O).

Legend of shapes: I channels in, O channels out, D H W voxels, kd kh kw the place in the kernel along them, P parts.
"""

import torch
import triton
import triton.language as tl

from medkernels.conv3d.rows import FOLDED

PARTS = 264  # two programs for each multiprocessor of an H100
HELD = 64 * 64  # sums of a plane that leave room for those of the other two


@triton.jit
def _sums(x, dy, parts, D, H, W, tiles, each, IN: tl.constexpr, OUT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
          FOLD: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One part: planes -1, 0, 1 of x at once, or the one of this program."""
    part = tl.program_id(0)
    plane = -1 if PLANES == 3 else tl.program_id(1) - 1
    m, n, w = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    kh, c = m // (M // 4), m % (M // 4)
    if FOLD:
        beside_x, beside_dy = m // IN % 4 - 1, n * 0
        offset = (w * IN)[:, None] + ((kh - 1) * W * IN + c - IN)[None, :]
        used, used_dy = (kh < 3) & (beside_x < 2), n >= 0
        offset_dy = (w * OUT)[:, None] + n[None, :]
    else:
        beside_x, beside_dy = m * 0, 1 - n // OUT
        offset = (w * IN)[:, None] + ((kh - 1) * W * IN + c)[None, :]
        used, used_dy = kh < 3, beside_dy >= -1
        offset_dy = (w * OUT)[:, None] + (beside_dy * OUT + n % OUT)[None, :]
    sums0, sums1, sums2 = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
    step = tl.cast(H, tl.int64) * W * IN
    across = tl.cdiv(W, BLOCK)
    for tile in tl.range(part * each, tl.minimum(part * each + each, tiles), num_stages=STAGES):
        row, first = tile // across, tile % across * BLOCK
        h, d = row % H, row // H % D
        at = (first + w)[:, None]
        there = used & (h + kh >= 1) & (h + kh <= H)
        inside = there[None, :] & (at + beside_x[None, :] >= 0) & (at + beside_x[None, :] < W)
        inside_dy = used_dy[None, :] & (at + beside_dy[None, :] >= 0) & (at + beside_dy[None, :] < W)
        gradient = tl.load(dy + (row.to(tl.int64) * W + first) * OUT + offset_dy, mask=inside_dy, other=0.0)
        start = x + ((row + plane * H).to(tl.int64) * W + first) * IN
        value = tl.load(start + offset, mask=inside & (d + plane >= 0) & (d + plane < D), other=0.0)
        sums0 = tl.dot(tl.trans(value), gradient, sums0)
        if PLANES == 3:
            value = tl.load(start + step + offset, mask=inside, other=0.0)
            sums1 = tl.dot(tl.trans(value), gradient, sums1)
            value = tl.load(start + 2 * step + offset, mask=inside & (d + 1 < D), other=0.0)
            sums2 = tl.dot(tl.trans(value), gradient, sums2)
    out = parts + (part * 3 + plane + 1).to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(out, sums0)
    if PLANES == 3:
        tl.store(out + M * N, sums1)
        tl.store(out + 2 * M * N, sums2)


@triton.jit
def _paired_sums(x, dy, parts, D, H, W, tiles, each, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    """As `_sums` of all planes, for two rows of dy at a time: four rows of x serve both, so all columns of a product
    are of use. Leaves two parts, one of the upper rows and one of the lower.
    """
    part = tl.program_id(0)
    M: tl.constexpr = 4 * IN
    N: tl.constexpr = 4 * OUT
    m, n, w = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    r, c, beside = m // IN, m % IN, 1 - n // OUT
    offset = (w * IN)[:, None] + ((r - 1) * W * IN + c)[None, :]
    offset_dy = (w * OUT)[:, None] + (beside * OUT + n % OUT)[None, :]
    upper0, upper1, upper2 = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
    lower0, lower1, lower2 = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
    step = tl.cast(H, tl.int64) * W * IN
    across, half = tl.cdiv(W, BLOCK), tl.cdiv(H, 2)
    for tile in tl.range(part * each, tl.minimum(part * each + each, tiles), num_stages=STAGES):
        pair, first = tile // across, tile % across * BLOCK
        h, plane = pair % half * 2, pair // half
        d, row = plane % D, tl.cast(plane, tl.int64) * H + h
        at = (first + w)[:, None]
        inside = ((h + r >= 1) & (h + r <= H))[None, :] & (at < W)
        inside_dy = (beside >= -1)[None, :] & (at + beside[None, :] >= 0) & (at + beside[None, :] < W)
        start_dy = dy + (row * W + first) * OUT
        upper = tl.load(start_dy + offset_dy, mask=inside_dy, other=0.0)
        lower = tl.load(start_dy + W * OUT + offset_dy, mask=inside_dy & (h + 1 < H), other=0.0)
        start = x + (row * W + first) * IN
        value = tl.load(start - step + offset, mask=inside & (d > 0), other=0.0)
        upper0 = tl.dot(tl.trans(value), upper, upper0)
        lower0 = tl.dot(tl.trans(value), lower, lower0)
        value = tl.load(start + offset, mask=inside, other=0.0)
        upper1 = tl.dot(tl.trans(value), upper, upper1)
        lower1 = tl.dot(tl.trans(value), lower, lower1)
        value = tl.load(start + step + offset, mask=inside & (d + 1 < D), other=0.0)
        upper2 = tl.dot(tl.trans(value), upper, upper2)
        lower2 = tl.dot(tl.trans(value), lower, lower2)
    out = parts + part.to(tl.int64) * 6 * M * N + m[:, None] * N + n[None, :]
    tl.store(out, upper0)
    tl.store(out + M * N, upper1)
    tl.store(out + 2 * M * N, upper2)
    out += (3 * M - IN) * N  # a lower row's kh is one less
    useful = (r >= 1)[:, None] & (n >= 0)[None, :]
    tl.store(out, lower0, mask=useful)
    tl.store(out + M * N, lower1, mask=useful)
    tl.store(out + 2 * M * N, lower2, mask=useful)


@triton.jit
def _collect(parts, dweight, P, o, i, kd, kh, kw, IN: tl.constexpr, OUT: tl.constexpr, FOLD: tl.constexpr,
             BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """Add the parts and put each sum into its place of a gradient (O,I,3,3,3) of any strides."""
    size: tl.constexpr = 3 * 16 * IN * OUT
    at, p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_P)
    n = at % OUT
    if FOLD:
        c, w = at // OUT % IN, at // (OUT * IN) % 4
    else:
        w, c = at // OUT % 4, at // (OUT * 4) % IN
    h, d = at // (OUT * IN * 4) % 4, at // (OUT * IN * 16)
    used = (at < size) & (h < 3) & (w < 3)
    sums = tl.zeros([BLOCK_P, BLOCK], tl.float32)
    for part in range(0, P, BLOCK_P):
        mask = (part + p < P)[:, None] & used[None, :]
        sums += tl.load(parts + (part + p).to(tl.int64)[:, None] * size + at[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, 0)
    place = dweight + n * o + c * i + d * kd + h * kh + w * kw
    tl.store(place, total.to(dweight.dtype.element_ty), mask=used)


def _parts(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Sums (P, 3 (4 kh I) (4 kw O)), whose fourth kh and kw are of no use, by the kernel that fits."""
    b, i, d, h, w = x.shape
    o, fold = dy.shape[1], i == FOLDED
    rows, columns = (16 * i, o) if fold else (4 * i, 4 * o)
    held = rows * columns <= HELD
    paired = held and not fold
    block = min(128 if fold else 64, max(16, triton.next_power_of_2(w)))
    tiles = b * d * triton.cdiv(h, 2 if paired else 1) * triton.cdiv(w, block)
    each = triton.cdiv(tiles, PARTS // 2 if paired else PARTS)
    count = triton.cdiv(tiles, each)
    parts = torch.empty((count * (2 if paired else 1), 3, rows, columns), dtype=torch.float32, device=x.device)
    sizes = (x, dy, parts, d, h, w, tiles, each)
    if paired:
        _paired_sums[(count,)](*sizes, IN=i, OUT=o, BLOCK=block, STAGES=3, num_warps=8)
    else:
        planes = 3 if held else 1
        _sums[(count, 3 // planes)](
            *sizes, IN=i, OUT=o, M=rows, N=columns, FOLD=fold, PLANES=planes, BLOCK=block, STAGES=2 if fold else 3,
            num_warps=4,
        )  # fmt: skip
    return parts


def weight_gradient(x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of weights (O,I,3,3,3) from x (B,I,D,H,W) and dy (B,O,D,H,W), both with channels last."""
    parts, dweight = _parts(x, dy), torch.empty_like(weight)
    o, i = weight.shape[:2]
    _collect[(triton.cdiv(parts[0].numel(), 64),)](
        parts, dweight, len(parts), *dweight.stride(), IN=i, OUT=o, FOLD=i == FOLDED, BLOCK=64, BLOCK_P=32,
        num_warps=4,
    )  # fmt: skip
    return dweight
