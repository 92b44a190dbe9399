"""Soft Dice of regions in Triton: one pass forward, one backward, region masks made from the codes in registers.

A program holds a run of voxels by four regions; a region is a set of codes in the bits of an integer.

Legend of shapes: B batch, K regions (R = 4 of them in registers), S voxels of a sample, J chunks of a sample's voxels,
Q the four sums: p t, p or p^2, t, cross-entropy.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from medkernels.layout import dense, strides_nsc

REGIONS = 4  # as MOST_REGIONS
BLOCK_S = 512  # voxels that a program holds at once
PROGRAMS = 1024
WARPS = 8


@triton.jit
def _truth(label, inside, at, m0, m1, m2, m3):
    """t of a run of voxels in all regions: bit `code` of each region's set. Codes above 30 are in none."""
    lane = tl.arange(0, 4)
    sets = tl.where(lane == 0, m0, tl.where(lane == 1, m1, tl.where(lane == 2, m2, m3)))
    code = tl.minimum(tl.load(label + at, mask=inside, other=31).to(tl.int32), 31)
    return (sets[None, :] >> code[:, None]) & 1


@triton.jit
def _sums(logits, label, partial_QBRJ, S, B, K, chunk, stride_b, stride_s, stride_k, m0, m1, m2, m3,
          SQUARED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The four sums of each region over one chunk."""
    j, b = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, 4)
    s = tl.arange(0, BLOCK)
    first = j * chunk
    end = tl.minimum(first + chunk, S)
    both = tl.zeros([BLOCK, 4], tl.float32)
    size = tl.zeros([BLOCK, 4], tl.float32)
    truth = tl.zeros([BLOCK, 4], tl.float32)
    entropy = tl.zeros([BLOCK, 4], tl.float32)
    base = logits + b.to(tl.int64) * stride_b + lane.to(tl.int64) * stride_k
    for start in range(first, end, BLOCK):
        inside = start + s < end
        at = tl.cast(start, tl.int64) * stride_s + (s * stride_s)[:, None]
        used = inside[:, None] & (lane < K)[None, :]
        x = tl.load(base[None, :] + at, mask=used, other=0.0).to(tl.float32)
        t = _truth(label, inside, b.to(tl.int64) * S + start + s, m0, m1, m2, m3).to(tl.float32)
        small = tl.exp(-tl.abs(x))  # never overflows
        p = tl.where(used, tl.where(x >= 0, 1.0, small) / (1.0 + small), 0.0)
        both += p * t
        size += p * p if SQUARED else p
        truth += t
        entropy += tl.where(used, tl.maximum(x, 0.0) - x * t + tl.log(1.0 + small), 0.0)
    out = (b * 4 + lane) * tl.num_programs(0) + j
    step = B * 4 * tl.num_programs(0)
    tl.store(partial_QBRJ + out, tl.sum(both, 0))
    tl.store(partial_QBRJ + step + out, tl.sum(size, 0))
    tl.store(partial_QBRJ + 2 * step + out, tl.sum(truth, 0))
    tl.store(partial_QBRJ + 3 * step + out, tl.sum(entropy, 0))


@triton.jit
def _sample_sum(partial_QBRJ, q, b, B, J, BLOCK: tl.constexpr):
    """One of the four sums of a sample, of all regions, over its chunks."""
    row = ((q * B + b) * 4 + tl.arange(0, 4)) * J
    j = tl.arange(0, BLOCK)
    total = tl.zeros([4, BLOCK], tl.float32)
    for start in range(0, J, BLOCK):
        inside = (start + j < J)[None, :] & (tl.arange(0, 4) >= 0)[:, None]
        total += tl.load(partial_QBRJ + row[:, None] + (start + j)[None, :], mask=inside, other=0.0)
    return tl.sum(total, 1)


@triton.jit
def _finish(partial_QBRJ, sums_B2R, loss, S, B, K, J, smooth_nr, smooth_dr, PER_SAMPLE: tl.constexpr,
            BCE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The loss, and numerator and denominator of each Dice term for the backward pass. One program, fixed order."""
    lane = tl.arange(0, 4)
    dice = tl.zeros([4], tl.float32)
    top = tl.zeros([4], tl.float32)
    bottom = tl.zeros([4], tl.float32)
    entropy = tl.zeros([4], tl.float32)
    for b in range(B):
        if PER_SAMPLE:
            top = tl.zeros([4], tl.float32)
            bottom = tl.zeros([4], tl.float32)
        top += 2.0 * _sample_sum(partial_QBRJ, 0, b, B, J, BLOCK)
        bottom += _sample_sum(partial_QBRJ, 1, b, B, J, BLOCK) + _sample_sum(partial_QBRJ, 2, b, B, J, BLOCK)
        if BCE:
            entropy += _sample_sum(partial_QBRJ, 3, b, B, J, BLOCK)
        if PER_SAMPLE:
            dice += 1.0 - (top + smooth_nr) / (bottom + smooth_dr)
            tl.store(sums_B2R + b * 8 + lane, top + smooth_nr)
            tl.store(sums_B2R + b * 8 + 4 + lane, bottom + smooth_dr)
    terms = tl.cast(K, tl.float32)
    if PER_SAMPLE:
        terms *= tl.cast(B, tl.float32)
    else:
        dice = 1.0 - (top + smooth_nr) / (bottom + smooth_dr)
        tl.store(sums_B2R + lane, top + smooth_nr)
        tl.store(sums_B2R + 4 + lane, bottom + smooth_dr)
    total = tl.sum(tl.where(lane < K, dice, 0.0), 0) / terms
    if BCE:
        total += tl.sum(entropy, 0) / (tl.cast(B * K, tl.float32) * tl.cast(S, tl.float32))
    tl.store(loss, total)


@triton.jit
def _gradient(dloss, logits, label, sums_B2R, dlogits, S, B, K, chunk, stride_b, stride_s, stride_k, m0, m1, m2, m3,
              SQUARED: tl.constexpr, PER_SAMPLE: tl.constexpr, BCE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """d/dp (1 - top/bottom) = (top (2p or 1) / bottom - 2 t) / bottom, through the sigmoid; p - t of cross-entropy."""
    j, b = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, 4)
    s = tl.arange(0, BLOCK)
    first = j * chunk
    end = tl.minimum(first + chunk, S)
    row = b * 8 if PER_SAMPLE else 0
    bottom = tl.load(sums_B2R + row + 4 + lane, mask=lane < K, other=1.0)
    ratio = (tl.load(sums_B2R + row + lane, mask=lane < K, other=0.0) / bottom)[None, :]
    outer = tl.load(dloss).to(tl.float32)
    terms = tl.cast(K, tl.float32) * (tl.cast(B, tl.float32) if PER_SAMPLE else 1.0)
    weight = (outer / terms / bottom)[None, :]
    each = outer / (tl.cast(B * K, tl.float32) * tl.cast(S, tl.float32))
    base = b.to(tl.int64) * stride_b + lane.to(tl.int64) * stride_k
    for start in range(first, end, BLOCK):
        inside = start + s < end
        at = base[None, :] + tl.cast(start, tl.int64) * stride_s + (s * stride_s)[:, None]
        used = inside[:, None] & (lane < K)[None, :]
        x = tl.load(logits + at, mask=used, other=0.0).to(tl.float32)
        t = _truth(label, inside, b.to(tl.int64) * S + start + s, m0, m1, m2, m3).to(tl.float32)
        small = tl.exp(-tl.abs(x))
        p = tl.where(x >= 0, 1.0, small) / (1.0 + small)
        slope = small / ((1.0 + small) * (1.0 + small))  # p (1 - p) without cancellation
        value = weight * (ratio * (2.0 * p if SQUARED else 1.0) - 2.0 * t) * slope
        if BCE:
            value += each * (p - t)
        tl.store(dlogits + at, value.to(dlogits.dtype.element_ty), mask=used)


def _plan(b: int, s: int) -> tuple[int, int]:
    """Voxels a chunk, chunks a sample."""
    blocks = triton.cdiv(s, BLOCK_S)
    chunk = triton.cdiv(blocks, max(1, min(blocks, PROGRAMS // b))) * BLOCK_S
    return chunk, triton.cdiv(s, chunk)


@torch.library.custom_op("medkernels::region_dice", mutates_args=())
def _forward(logits: torch.Tensor, label: torch.Tensor, sets: Sequence[int], squared: bool, per_sample: bool,
             smooth_nr: float, smooth_dr: float, bce: bool) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    logits, label = dense(logits), label.contiguous()
    b, k, s = logits.shape[0], logits.shape[1], label[0].numel()
    chunk, chunks = _plan(b, s)
    partial = logits.new_empty((4, b, REGIONS, chunks), dtype=torch.float32)
    sums = logits.new_empty((b if per_sample else 1, 2, REGIONS), dtype=torch.float32)
    loss = logits.new_empty((), dtype=torch.float32)
    _sums[(chunks, b)](logits, label, partial, s, b, k, chunk, *strides_nsc(logits), *sets, SQUARED=squared,
                       BLOCK=BLOCK_S, num_warps=WARPS)  # fmt: skip
    _finish[(1,)](partial, sums, loss, s, b, k, chunks, smooth_nr, smooth_dr, PER_SAMPLE=per_sample, BCE=bce,
                  BLOCK=min(512, triton.next_power_of_2(chunks)))  # fmt: skip
    return loss, sums


@_forward.register_fake
def _(logits, label, sets, squared, per_sample, smooth_nr, smooth_dr, bce):
    sums = logits.new_empty((logits.shape[0] if per_sample else 1, 2, REGIONS), dtype=torch.float32)
    return logits.new_empty((), dtype=torch.float32), sums


@torch.library.custom_op("medkernels::region_dice_backward", mutates_args=())
def _backward(dloss: torch.Tensor, logits: torch.Tensor, label: torch.Tensor, sums: torch.Tensor, sets: Sequence[int],
              squared: bool, per_sample: bool, bce: bool) -> torch.Tensor:  # fmt: skip
    logits, label = dense(logits), label.contiguous()
    b, k, s = logits.shape[0], logits.shape[1], label[0].numel()
    chunk, chunks = _plan(b, s)
    dlogits = torch.empty_like(logits)
    _gradient[(chunks, b)](dloss, logits, label, sums, dlogits, s, b, k, chunk, *strides_nsc(logits), *sets,
                           SQUARED=squared, PER_SAMPLE=per_sample, BCE=bce, BLOCK=BLOCK_S,
                           num_warps=WARPS)  # fmt: skip
    return dlogits


@_backward.register_fake
def _(dloss, logits, label, sums, sets, squared, per_sample, bce):
    return torch.empty_like(dense(logits))


def _save(ctx, inputs, output) -> None:
    logits, label, ctx.sets, ctx.squared, ctx.per_sample, _, _, ctx.bce = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, label, output[1])


def _differentiate(ctx, dloss, _sums):
    logits, label, sums = ctx.saved_tensors
    dlogits = _backward(dloss, logits, label, sums, ctx.sets, ctx.squared, ctx.per_sample, ctx.bce)
    return dlogits, None, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def region_dice(
    logits: torch.Tensor, label: torch.Tensor, regions: Sequence[Sequence[int]], squared: bool, per_sample: bool,
    smooth_nr: float, smooth_dr: float, bce: bool,
) -> torch.Tensor:  # fmt: skip
    """See `medkernels.region_dice`."""
    sets = [sum(1 << code for code in set(codes)) for codes in regions]
    sets += [0] * (REGIONS - len(sets))
    return _forward(logits, label, sets, squared, per_sample, smooth_nr, smooth_dr, bce)[0]
