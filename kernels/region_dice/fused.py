"""Soft Dice of regions in Triton: one pass forward, one backward, region masks made from the codes in registers.

A program takes a run of one sample's voxels in one region; a region is a set of codes in the bits of an integer.

Legend of shapes: B batch, K regions (R = 4 of them in memory), S voxels of a sample, J chunks of a sample's voxels,
Q the four sums: p t, p or p^2, t, cross-entropy.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from medkernels.layout import dense, strides_nsc

REGIONS = 4  # as MOST_REGIONS
BLOCK_S = 2048  # voxels that a program holds at once
PROGRAMS = 1056  # eight for each multiprocessor of an H100
MOST = 64  # blocks of a chunk: a product of so many numbers up to two stays within float32
WARPS = 8


@triton.jit
def _set_of(k, m0, m1, m2, m3):
    """The codes of a region, as bits."""
    return tl.where(k == 0, m0, tl.where(k == 1, m1, tl.where(k == 2, m2, m3)))


@triton.jit
def _truth(label, inside, at, codes):
    """t of a run of voxels: bit `code` of the region's set. Codes above 30 are in none."""
    code = tl.minimum(tl.load(label + at, mask=inside, other=31).to(tl.int32), 31)
    return ((codes >> code) & 1).to(tl.float32)


@triton.jit
def _sums(logits, label, partial_QBRJ, S, B, K, chunk, stride_b, stride_s, stride_k, m0, m1, m2, m3,
          SQUARED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The four sums of one region over one chunk. log(1 + exp(-|x|)) is summed as the logarithm of a product."""
    j, b, k = tl.program_id(0), tl.program_id(1) // K, tl.program_id(1) % K
    codes = _set_of(k, m0, m1, m2, m3)
    s = tl.arange(0, BLOCK)
    first = j * chunk
    end = tl.minimum(first + chunk, S)
    both = tl.zeros([BLOCK], tl.float32)
    size = tl.zeros([BLOCK], tl.float32)
    truth = tl.zeros([BLOCK], tl.float32)
    entropy = tl.zeros([BLOCK], tl.float32)
    product = tl.full([BLOCK], 1.0, tl.float32)
    base = logits + b.to(tl.int64) * stride_b + k.to(tl.int64) * stride_k
    for start in range(first, end, BLOCK):
        inside = start + s < end
        x = tl.load(base + tl.cast(start, tl.int64) * stride_s + s * stride_s, mask=inside, other=0.0).to(tl.float32)
        t = _truth(label, inside, b.to(tl.int64) * S + start + s, codes)
        small = tl.exp(-tl.abs(x))  # never overflows
        p = tl.where(inside, tl.where(x >= 0, 1.0, small) / (1.0 + small), 0.0)
        both += p * t
        size += p * p if SQUARED else p
        truth += t
        entropy += tl.maximum(x, 0.0) - x * t  # zero outside
        product *= tl.where(inside, 1.0 + small, 1.0)
    entropy += tl.log(product)
    out = (b * 4 + k) * tl.num_programs(0) + j
    step = B * 4 * tl.num_programs(0)
    tl.store(partial_QBRJ + out, tl.sum(both, 0))
    tl.store(partial_QBRJ + step + out, tl.sum(size, 0))
    tl.store(partial_QBRJ + 2 * step + out, tl.sum(truth, 0))
    tl.store(partial_QBRJ + 3 * step + out, tl.sum(entropy, 0))


@triton.jit
def _sample_sum(partial_QBRJ, q, b, B, K, J, BLOCK: tl.constexpr):
    """One of the four sums of a sample, of all regions, over its chunks."""
    row = ((q * B + b) * 4 + tl.arange(0, 4)) * J
    j = tl.arange(0, BLOCK)
    total = tl.zeros([4, BLOCK], tl.float32)
    for start in range(0, J, BLOCK):
        inside = (start + j < J)[None, :] & (tl.arange(0, 4) < K)[:, None]
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
        top += 2.0 * _sample_sum(partial_QBRJ, 0, b, B, K, J, BLOCK)
        bottom += _sample_sum(partial_QBRJ, 1, b, B, K, J, BLOCK) + _sample_sum(partial_QBRJ, 2, b, B, K, J, BLOCK)
        if BCE:
            entropy += _sample_sum(partial_QBRJ, 3, b, B, K, J, BLOCK)
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
    j, b, k = tl.program_id(0), tl.program_id(1) // K, tl.program_id(1) % K
    codes = _set_of(k, m0, m1, m2, m3)
    s = tl.arange(0, BLOCK)
    first = j * chunk
    end = tl.minimum(first + chunk, S)
    row = (b * 8 if PER_SAMPLE else 0) + k
    bottom = tl.load(sums_B2R + row + 4)
    ratio = tl.load(sums_B2R + row) / bottom
    outer = tl.load(dloss).to(tl.float32)
    terms = tl.cast(K, tl.float32) * (tl.cast(B, tl.float32) if PER_SAMPLE else 1.0)
    weight = outer / terms / bottom
    each = outer / (tl.cast(B * K, tl.float32) * tl.cast(S, tl.float32))
    base = b.to(tl.int64) * stride_b + k.to(tl.int64) * stride_k
    for start in range(first, end, BLOCK):
        inside = start + s < end
        at = base + tl.cast(start, tl.int64) * stride_s + s * stride_s
        x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
        t = _truth(label, inside, b.to(tl.int64) * S + start + s, codes)
        small = tl.exp(-tl.abs(x))
        share = 1.0 / (1.0 + small)
        p = tl.where(x >= 0, 1.0, small) * share
        slope = small * share * share  # p (1 - p) without cancellation
        value = weight * (ratio * (2.0 * p if SQUARED else 1.0) - 2.0 * t) * slope
        if BCE:
            value += each * (p - t)
        tl.store(dlogits + at, value.to(dlogits.dtype.element_ty), mask=inside)


def _plan(rows: int, s: int) -> tuple[int, int]:
    """Voxels a chunk, chunks of each of some rows of voxels."""
    blocks = triton.cdiv(s, BLOCK_S)
    chunk = min(MOST, triton.cdiv(blocks, max(1, min(blocks, PROGRAMS // rows)))) * BLOCK_S
    return chunk, triton.cdiv(s, chunk)


@torch.library.custom_op("medkernels::region_dice", mutates_args=())
def _forward(logits: torch.Tensor, label: torch.Tensor, sets: Sequence[int], squared: bool, per_sample: bool,
             smooth_nr: float, smooth_dr: float, bce: bool) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    logits, label = dense(logits), label.contiguous()
    b, k, s = logits.shape[0], logits.shape[1], label[0].numel()
    chunk, chunks = _plan(b * k, s)
    partial = logits.new_empty((4, b, REGIONS, chunks), dtype=torch.float32)
    sums = logits.new_empty((b if per_sample else 1, 2, REGIONS), dtype=torch.float32)
    loss = logits.new_empty((), dtype=torch.float32)
    _sums[(chunks, b * k)](logits, label, partial, s, b, k, chunk, *strides_nsc(logits), *sets, SQUARED=squared,
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
    chunk, chunks = _plan(b * k, s)
    dlogits = torch.empty_like(logits)
    _gradient[(chunks, b * k)](dloss, logits, label, sums, dlogits, s, b, k, chunk, *strides_nsc(logits), *sets,
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
