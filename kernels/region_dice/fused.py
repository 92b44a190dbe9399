"""Soft Dice of regions in Triton: one pass forward, one backward, region masks made from the codes in registers.

A region is a set of codes in the bits of an integer. With channels first a program takes a run of one sample's voxels
in one region. With channels last K neighbouring programs share a run of voxels with all their K regions: each reads
every Kth block of memory, so a lane sees one region all the way.

Legend of shapes: B batch, K regions (R = 4 of them in memory), S voxels of a sample, J parts of a region's sums,
Q the four sums: p t, p or p^2, t, cross-entropy.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from medkernels.layout import dense, strides_nsc

REGIONS = 4  # as MOST_REGIONS
BLOCK_S = 1024  # voxels that a program holds at once
PROGRAMS = 1056  # eight for each multiprocessor of an H100
MOST = 64  # blocks of a chunk: a product of so many numbers up to two stays within float32
WARPS = 4
STAGES = 3  # reads of a first pass that are under way while a program sums


@triton.jit
def _lanes(r, m0, m1, m2, m3, K: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Of the lanes of a block: region, its set of codes, voxel from the block's first, place in memory likewise."""
    i = tl.arange(0, BLOCK)
    at = r * BLOCK + i if LAST else i
    k = at % K if LAST else r
    codes = tl.where(k == 0, m0, tl.where(k == 1, m1, tl.where(k == 2, m2, m3)))
    return k, codes, at // K if LAST else i, at


@triton.jit
def _read(logits, label, start, end, b, S, codes, voxel, at, K: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr):
    """Logits of a block in float32, whether each voxel is of the lane's region, and what lies inside the chunk.
    Codes above 30 are in no region.
    """
    first = tl.cast(start, tl.int64) * (K if LAST else 1)
    truth = label + b.to(tl.int64) * S + start + voxel
    if EVEN:
        inside = at >= 0
        x, code = tl.load(logits + first + at), tl.load(truth)
    else:
        inside = at < (end - start) * (K if LAST else 1)
        x, code = tl.load(logits + first + at, mask=inside, other=0.0), tl.load(truth, mask=inside, other=31)
    hit = ((codes >> tl.minimum(code.to(tl.int32), 31)) & 1) != 0
    return x.to(tl.float32), hit, inside, first


@triton.jit
def _put(partial_QBRJ, sums, k, j, r, b, step, J, K: tl.constexpr, LAST: tl.constexpr):
    """Store a block's sums: one number with channels first, one for each region with channels last."""
    if LAST:
        for region in tl.static_range(K):
            of_region = tl.sum(tl.where(k == region, sums, 0.0), 0)
            tl.store(partial_QBRJ + step + (b * 4 + region) * J + j * K + r, of_region)
    else:
        tl.store(partial_QBRJ + step + (b * 4 + r) * J + j, tl.sum(sums, 0))


@triton.jit
def _sums(logits, label, partial_QBRJ, S, B, chunk, stride_b, stride_k, m0, m1, m2, m3, SQUARED: tl.constexpr,
          K: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
          STAGES: tl.constexpr):  # fmt: skip
    """The four sums over one chunk. log(1 + exp(-|x|)) is summed as the logarithm of a product."""
    j, b, r = tl.program_id(0), tl.program_id(1) // K, tl.program_id(1) % K
    k, codes, voxel, at = _lanes(r, m0, m1, m2, m3, K, LAST, BLOCK)
    first = j * chunk
    end = tl.minimum(first + chunk, S)
    both = tl.zeros([BLOCK], tl.float32)
    size = tl.zeros([BLOCK], tl.float32)
    truth = tl.zeros([BLOCK], tl.float32)
    entropy = tl.zeros([BLOCK], tl.float32)
    product = tl.full([BLOCK], 1.0, tl.float32)
    base = logits + b.to(tl.int64) * stride_b + (0 if LAST else r.to(tl.int64) * stride_k)
    for start in tl.range(first, end, BLOCK, num_stages=STAGES):
        x, hit, inside, _ = _read(base, label, start, end, b, S, codes, voxel, at, K, LAST, EVEN)
        small = tl.exp(-tl.abs(x))  # never overflows
        p = tl.where(x >= 0, 1.0, small) / (1.0 + small)
        if not EVEN:
            p, small = tl.where(inside, p, 0.0), tl.where(inside, small, 0.0)
        both += tl.where(hit, p, 0.0)
        size += p * p if SQUARED else p
        truth += tl.where(hit, 1.0, 0.0)
        entropy += tl.maximum(x, 0.0) - tl.where(hit, x, 0.0)  # zero outside
        product *= 1.0 + small
    entropy += tl.log(product)
    J = tl.num_programs(0) * (K if LAST else 1)
    step = B * 4 * J
    _put(partial_QBRJ, both, k, j, r, b, 0, J, K, LAST)
    _put(partial_QBRJ, size, k, j, r, b, step, J, K, LAST)
    _put(partial_QBRJ, truth, k, j, r, b, 2 * step, J, K, LAST)
    _put(partial_QBRJ, entropy, k, j, r, b, 3 * step, J, K, LAST)


@triton.jit
def _finish(partial_QBRJ, sums_B2R, loss, S, B, K, J, smooth_nr, smooth_dr, PER_SAMPLE: tl.constexpr,
            BCE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The loss, and numerator and denominator of each Dice term for the backward pass. One program, fixed order."""
    lane = tl.arange(0, 4)
    i = tl.arange(0, BLOCK)
    dice = tl.zeros([4], tl.float32)
    both = tl.zeros([4, BLOCK], tl.float32)
    size = tl.zeros([4, BLOCK], tl.float32)
    entropy = tl.zeros([4, BLOCK], tl.float32)
    step = B * 4 * J
    for b in range(B):
        if PER_SAMPLE:
            both = tl.zeros([4, BLOCK], tl.float32)
            size = tl.zeros([4, BLOCK], tl.float32)
        row = partial_QBRJ + ((b * 4 + lane) * J)[:, None]
        for start in range(0, J, BLOCK):
            at = row + (start + i)[None, :]
            inside = (start + i < J)[None, :] & (lane < K)[:, None]
            both += tl.load(at, mask=inside, other=0.0)
            size += tl.load(at + step, mask=inside, other=0.0) + tl.load(at + 2 * step, mask=inside, other=0.0)
            if BCE:
                entropy += tl.load(at + 3 * step, mask=inside, other=0.0)
        if PER_SAMPLE:
            top = 2.0 * tl.sum(both, 1) + smooth_nr
            bottom = tl.sum(size, 1) + smooth_dr
            dice += 1.0 - top / bottom
            tl.store(sums_B2R + b * 8 + lane, top)
            tl.store(sums_B2R + b * 8 + 4 + lane, bottom)
    terms = tl.cast(K, tl.float32)
    if PER_SAMPLE:
        terms *= tl.cast(B, tl.float32)
    else:
        top = 2.0 * tl.sum(both, 1) + smooth_nr
        bottom = tl.sum(size, 1) + smooth_dr
        dice = 1.0 - top / bottom
        tl.store(sums_B2R + lane, top)
        tl.store(sums_B2R + 4 + lane, bottom)
    total = tl.sum(tl.where(lane < K, dice, 0.0), 0) / terms
    if BCE:
        total += tl.sum(tl.sum(entropy, 1), 0) / (tl.cast(B * K, tl.float32) * tl.cast(S, tl.float32))
    tl.store(loss, total)


@triton.jit
def _gradient(dloss, logits, label, sums_B2R, dlogits, S, B, chunk, stride_b, stride_k, m0, m1, m2, m3,
              SQUARED: tl.constexpr, PER_SAMPLE: tl.constexpr, BCE: tl.constexpr, K: tl.constexpr, LAST: tl.constexpr,
              EVEN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """d/dp (1 - top/bottom) = (top (2p or 1) / bottom - 2 t) / bottom, through the sigmoid; p - t of cross-entropy."""
    j, b, r = tl.program_id(0), tl.program_id(1) // K, tl.program_id(1) % K
    k, codes, voxel, at = _lanes(r, m0, m1, m2, m3, K, LAST, BLOCK)
    first = j * chunk
    end = tl.minimum(first + chunk, S)
    row = (b * 8 if PER_SAMPLE else 0) + k
    bottom = tl.load(sums_B2R + row + 4)
    ratio = tl.load(sums_B2R + row) / bottom * (2.0 if SQUARED else 1.0)
    outer = tl.load(dloss).to(tl.float32)
    weight = outer / (tl.cast(K, tl.float32) * (tl.cast(B, tl.float32) if PER_SAMPLE else 1.0)) / bottom
    each = outer / (tl.cast(B * K, tl.float32) * tl.cast(S, tl.float32))
    base = b.to(tl.int64) * stride_b + (0 if LAST else r.to(tl.int64) * stride_k)
    for start in range(first, end, BLOCK):
        x, hit, inside, there = _read(logits + base, label, start, end, b, S, codes, voxel, at, K, LAST, EVEN)
        small = tl.exp(-tl.abs(x))
        share = 1.0 / (1.0 + small)
        p = tl.where(x >= 0, 1.0, small) * share
        slope = small * share * share  # p (1 - p) without cancellation
        value = weight * (ratio * (p if SQUARED else 1.0) - tl.where(hit, 2.0, 0.0)) * slope
        if BCE:
            value += each * (p - tl.where(hit, 1.0, 0.0))
        if EVEN:  # a mask, though all true, would split what a thread writes
            tl.store(dlogits + base + there + at, value.to(dlogits.dtype.element_ty))
        else:
            tl.store(dlogits + base + there + at, value.to(dlogits.dtype.element_ty), mask=inside)


def _plan(rows: int, s: int) -> tuple[int, int]:
    """Voxels a chunk, chunks of each of some rows of voxels."""
    blocks = triton.cdiv(s, BLOCK_S)
    chunk = min(MOST, triton.cdiv(blocks, max(1, min(blocks, PROGRAMS // rows)))) * BLOCK_S
    return chunk, triton.cdiv(s, chunk)


def _shape(logits: torch.Tensor) -> dict[str, int | bool]:
    """What the kernels are compiled for."""
    k, s = logits.shape[1], logits[0, 0].numel()
    last = strides_nsc(logits)[1] != 1
    return {"K": k, "LAST": last, "EVEN": s % BLOCK_S == 0, "BLOCK": BLOCK_S, "num_warps": WARPS}


@torch.library.custom_op("medkernels::region_dice", mutates_args=())
def _forward(logits: torch.Tensor, label: torch.Tensor, sets: Sequence[int], squared: bool, per_sample: bool,
             smooth_nr: float, smooth_dr: float, bce: bool) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    logits, label = dense(logits), label.contiguous()
    b, k, s = logits.shape[0], logits.shape[1], label[0].numel()
    chunk, chunks = _plan(b * k, s)
    shape, (stride_b, _, stride_k) = _shape(logits), strides_nsc(logits)
    parts = chunks * (k if shape["LAST"] else 1)
    partial = logits.new_empty((4, b, REGIONS, parts), dtype=torch.float32)
    sums = logits.new_empty((b if per_sample else 1, 2, REGIONS), dtype=torch.float32)
    loss = logits.new_empty((), dtype=torch.float32)
    _sums[(chunks, b * k)](logits, label, partial, s, b, chunk, stride_b, stride_k, *sets, SQUARED=squared,
                           STAGES=STAGES, **shape)  # fmt: skip
    _finish[(1,)](partial, sums, loss, s, b, k, parts, smooth_nr, smooth_dr, PER_SAMPLE=per_sample, BCE=bce,
                  BLOCK=min(512, triton.next_power_of_2(parts)), num_warps=16)  # fmt: skip
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
    stride_b, _, stride_k = strides_nsc(logits)
    _gradient[(chunks, b * k)](dloss, logits, label, sums, dlogits, s, b, chunk, stride_b, stride_k, *sets,
                               SQUARED=squared, PER_SAMPLE=per_sample, BCE=bce, **_shape(logits))  # fmt: skip
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
