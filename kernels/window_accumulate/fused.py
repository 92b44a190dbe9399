"""Weighted addition of sliding windows in Triton: each program owns a tile of the volume and gathers from all windows.

Legend of shapes: M members, B windows, K regions, d h w voxels of a window, D H W of the volume.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

TILE = 1024
WARPS = 4


@triton.jit
def _gather(total, weight, windows, importance, starts, first_d, first_h, first_w, end_h, end_w, D, H, W, B, K,
            d, h, w, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """One tile at one depth of the windows' bounding box, of one region of one member."""
    tile, deep, mk = tl.program_id(0), tl.program_id(1) + first_d, tl.program_id(2)
    across = tl.cdiv(end_w - first_w, BLOCK_W)
    row = first_h + (tile // across) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    column = first_w + (tile % across) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    volume = (row < end_h) & (column < end_w)
    at = deep.to(tl.int64) * H * W + (row * W + column)
    place = total + mk.to(tl.int64) * D * H * W + at
    value = tl.load(place, mask=volume, other=0.0)
    gained = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    for b in range(B):
        i = deep - tl.load(starts + 3 * b)
        j = row - tl.load(starts + 3 * b + 1)
        k = column - tl.load(starts + 3 * b + 2)
        if (i >= 0) & (i < d):
            inside = volume & (j >= 0) & (j < h) & (k >= 0) & (k < w)
            within = (i * h + j) * w + k
            share = tl.load(importance + within, mask=inside, other=0.0)
            window = (mk // K * B + b) * K + mk % K
            source = windows + window.to(tl.int64) * d * h * w + within
            value += share * tl.load(source, mask=inside, other=0.0).to(tl.float32)
            gained += share
    tl.store(place, value, mask=volume)
    if mk == 0:
        tl.store(weight + at, tl.load(weight + at, mask=volume, other=0.0) + gained, mask=volume)


@torch.library.custom_op("medkernels::window_accumulate", mutates_args=("total", "weight"))
def _accumulate(total: torch.Tensor, weight: torch.Tensor, windows: torch.Tensor, starts: Sequence[int],
                importance: torch.Tensor) -> None:  # fmt: skip
    windows = windows.contiguous()
    members, batch, regions, *side = windows.shape
    corners = torch.tensor(starts, dtype=torch.int32).reshape(batch, 3)
    first = corners.amin(0).tolist()
    end = [int(at) + n for at, n in zip(corners.amax(0), side, strict=True)]
    there = corners.pin_memory().to(total.device, non_blocking=True) if total.is_cuda else corners
    block_w = min(128, triton.next_power_of_2(end[2] - first[2]))
    block_h = min(TILE // block_w, triton.next_power_of_2(end[1] - first[1]))
    tiles = triton.cdiv(end[1] - first[1], block_h) * triton.cdiv(end[2] - first[2], block_w)
    _gather[(tiles, end[0] - first[0], members * regions)](
        total, weight, windows, importance, there, *first, *end[1:], *weight.shape, batch, regions,
        *side, BLOCK_H=block_h, BLOCK_W=block_w, num_warps=WARPS,
    )  # fmt: skip


@_accumulate.register_fake
def _(total, weight, windows, starts, importance):
    return None


def window_accumulate(
    total_MKDHW: torch.Tensor, weight_DHW: torch.Tensor, windows_MBKdhw: torch.Tensor,
    starts: Sequence[tuple[int, int, int]], importance_dhw: torch.Tensor,
) -> None:  # fmt: skip
    """See `medkernels.window_accumulate`."""
    flat = [at for start in starts for at in start]
    _accumulate(total_MKDHW, weight_DHW, windows_MBKdhw, flat, importance_dhw)
