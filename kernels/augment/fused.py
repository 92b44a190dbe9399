"""Crop, flip, warp and intensity in Triton: every output voxel is read once, by its eight neighbours, and written once.

Legend of shapes: B samples, C channels, D H W the crop; n voxels of a volume.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

TILE = 512  # 4 voxels a thread: with 8 their coordinates and weights spill registers
WARPS = 4


@triton.jit
def _axis(matrix, d, h, w):
    """One coordinate of the input, centres at whole numbers, of output voxels with centres at one half."""
    m0, m1, m2, m3 = tl.load(matrix), tl.load(matrix + 1), tl.load(matrix + 2), tl.load(matrix + 3)
    return m0 * (d + 0.5) + m1 * (h + 0.5) + m2 * (w + 0.5) + (m3 - 0.5)


@triton.jit
def _turned(at, size, flip):
    return tl.where(tl.load(flip) != 0, size - 1 - at, at).to(tl.float32)


@triton.jit
def _gather(image, label, table_B10, parameters, out_image, out_label, D, H, W, C, R,
            BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """One tile at one depth of one sample, all channels and the label."""
    b, deep = tl.program_id(2), tl.program_id(1)
    across = tl.cdiv(W, BLOCK_W)
    row = (tl.program_id(0) // across) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    column = (tl.program_id(0) % across) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    used = (row < H) & (column < W)
    own = parameters + b * R
    d, h, w = _turned(deep, D, own + 12), _turned(row, H, own + 13), _turned(column, W, own + 14)
    z, y, x = _axis(own, d, h, w), _axis(own + 4, d, h, w), _axis(own + 8, d, h, w)
    place = table_B10 + b * 10
    first = tl.load(place)
    nd, nh, nw = tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
    sd, sh, sw = tl.load(place + 4), tl.load(place + 5), tl.load(place + 6)
    ld, lh, lw = tl.load(place + 7) - sd, tl.load(place + 8) - sh, tl.load(place + 9) - sw
    out = deep.to(tl.int64) * H * W + (row * W + column)

    i, j, k = tl.floor(z + 0.5).to(tl.int32), tl.floor(y + 0.5).to(tl.int32), tl.floor(x + 0.5).to(tl.int32)
    inside = used & (i >= 0) & (i < ld) & (j >= 0) & (j < lh) & (k >= 0) & (k < lw)
    at = ((i + sd) * nh + (j + sh)) * nw + (k + sw)
    code = tl.load(label + first + at, mask=inside, other=0)
    tl.store(out_label + b.to(tl.int64) * D * H * W + out, code, mask=used)

    i, j, k = tl.floor(z).to(tl.int32), tl.floor(y).to(tl.int32), tl.floor(x).to(tl.int32)
    fz, fy, fx = z - i, y - j, x - k
    for c in range(C):
        value = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
        volume = image + (first * C + c * nd * nh * nw)
        for corner in tl.static_range(8):
            u, v, t = i + corner // 4, j + corner // 2 % 2, k + corner % 2
            along_z = fz if corner // 4 == 1 else 1.0 - fz
            along_y = fy if corner // 2 % 2 == 1 else 1.0 - fy
            along_x = fx if corner % 2 == 1 else 1.0 - fx
            weight = along_z * along_y * along_x
            # weights of zero, as in every crop that is not warped, cost no read
            here = used & (weight != 0) & (u >= 0) & (u < ld) & (v >= 0) & (v < lh) & (t >= 0) & (t < lw)
            at = ((u + sd) * nh + (v + sh)) * nw + (t + sw)
            value += weight * tl.load(volume + at, mask=here, other=0).to(tl.float32)
        scale, shift = tl.load(own + 15 + c), tl.load(own + 15 + C + c)
        target = out_image + (b.to(tl.int64) * C + c) * D * H * W + out
        tl.store(target, value * scale + shift, mask=used)


@torch.library.custom_op("medkernels::augment", mutates_args=())
def _augment(image: torch.Tensor, label: torch.Tensor, table: torch.Tensor, parameters: torch.Tensor, channels: int,
             crop: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    d, h, w = crop
    batch = len(table)
    out_image = torch.empty((batch, channels, d, h, w), dtype=torch.float32, device=image.device)
    out_label = torch.empty((batch, d, h, w), dtype=torch.uint8, device=image.device)
    block_w = min(128, triton.next_power_of_2(w))
    block_h = min(TILE // block_w, triton.next_power_of_2(h))
    grid = (triton.cdiv(h, block_h) * triton.cdiv(w, block_w), d, batch)
    # pinned memory lets these few numbers travel while the device still works
    few = [t.pin_memory() if image.is_cuda else t for t in (table, parameters)]
    table, parameters = (t.to(image.device, non_blocking=True) for t in few)
    _gather[grid](image, label, table, parameters, out_image, out_label, d, h, w, channels, parameters.shape[1],
                  BLOCK_H=block_h, BLOCK_W=block_w, num_warps=WARPS)  # fmt: skip
    return out_image, out_label


@_augment.register_fake
def _(image, label, table, parameters, channels, crop):
    batch = table.shape[0]
    return (
        torch.empty((batch, channels, *crop), dtype=torch.float32, device=image.device),
        torch.empty((batch, *crop), dtype=torch.uint8, device=image.device),
    )


def augment(image: torch.Tensor, label: torch.Tensor, table: torch.Tensor, parameters: torch.Tensor, channels: int,
            crop: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See `medkernels.augment`."""
    image_BCDHW, label_BDHW = _augment(image, label, table, parameters, channels, crop)
    return image_BCDHW, label_BDHW
