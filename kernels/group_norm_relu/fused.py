"""Group normalisation and rectifier in Triton: two passes forward, two backward, all reductions in a fixed order.

Small groups go to `whole.py`; here several programs share a group, each with a chunk of its voxels.

A sample is a table of S voxels by C channels with two strides, so one kernel serves both layouts: with channels first
a program takes a run of voxels of one channel (of several where they are short), with channels last a run of voxels
with all their channels.

Legend of shapes: N samples, C channels, G groups, S voxels of a sample, K chunks of a sample's voxels.
"""

import torch
import triton
import triton.language as tl

from medkernels.group_norm_relu import whole
from medkernels.group_norm_relu.parts import channel, input_gradient, normalize, through_rectifier
from medkernels.layout import dense, like, strides_nsc

TILE = 4096  # elements that a program holds at once: 32 a thread
PROGRAMS = 1056  # at most: eight for each multiprocessor of an H100
EACH = 4 * TILE  # elements that a program takes at least, while every multiprocessor has two: parts cost time to merge
WARPS = 4
STAGES = 3  # reads of a first pass that are under way while a program sums


def plan(n: int, c: int, s: int, stride_c: int) -> tuple[int, int, int, int]:
    """BLOCK_S, BLOCK_C, voxels a chunk, chunks a sample."""
    if stride_c == 1:
        block_c = min(128, triton.next_power_of_2(c))
        block_s = min(TILE // block_c, triton.next_power_of_2(s))
    else:
        block_s = min(TILE, triton.next_power_of_2(s))
        block_c = min(128, TILE // block_s, triton.next_power_of_2(c))
    blocks = triton.cdiv(s, block_s)
    programs = min(PROGRAMS, max(PROGRAMS // 4, n * c * s // EACH))
    most = max(1, programs // (n * triton.cdiv(c, block_c)))
    chunk = triton.cdiv(blocks, min(blocks, most)) * block_s
    return block_s, block_c, chunk, triton.cdiv(s, chunk)


@triton.jit
def _backwards():
    """Chunk, block and sample of a second pass, last first: the cache still holds what the first pass read last."""
    k, n = tl.num_programs(0) - 1 - tl.program_id(0), tl.num_programs(2) - 1 - tl.program_id(2)
    return k, tl.program_id(1), n


@triton.jit
def _moments(x, mean_NCK, square_NCK, S, C, chunk, stride_n, stride_s, stride_c,
             BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Mean and sum of squared distances of each channel over one chunk.

    The sums are of distances from the chunk's first voxel, so a large mean costs no digits.
    """
    k, block, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    first = k * chunk
    end = tl.minimum(first + chunk, S)
    base = x + n.to(tl.int64) * stride_n + c.to(tl.int64) * stride_c
    origin = tl.load(base + first.to(tl.int64) * stride_s, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in tl.range(first, end, BLOCK_S, num_stages=STAGES):
        inside = (start + s < end)[:, None] & (c < C)[None, :]
        at = base[None, :] + tl.cast(start, tl.int64) * stride_s + (s * stride_s)[:, None]
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        away = tl.where(inside, value - origin[None, :], 0.0)
        total += away
        square += away * away
    count = (end - first).to(tl.float32)
    total_C = tl.sum(total, 0)
    square_C = tl.sum(square, 0)
    out = (n * C + c) * tl.num_programs(0) + k
    tl.store(mean_NCK + out, origin + total_C / count, mask=c < C)
    tl.store(square_NCK + out, tl.maximum(square_C - total_C * total_C / count, 0.0), mask=c < C)


@triton.jit
def _merge_moments(mean_NCK, square_NCK, mean_NG, rstd_NG, S, C, chunk, K, eps, BLOCK: tl.constexpr):
    """Mean and 1/sqrt(var + eps) of each group from its channels' chunks (Chan et al. 1979)."""
    g, n = tl.program_id(0), tl.program_id(1)
    G = tl.num_programs(0)
    channels = C // G
    row = (n * C + g * channels) * K
    i = tl.arange(0, BLOCK)
    origin = tl.load(mean_NCK + row)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, channels * K, BLOCK):
        at = start + i
        inside = at < channels * K
        count = tl.minimum(chunk, S - (at % K) * chunk).to(tl.float32)
        mean = tl.load(mean_NCK + row + at, mask=inside, other=0.0)
        weighted += tl.where(inside, count * (mean - origin), 0.0)
    voxels = tl.cast(channels, tl.float32) * tl.cast(S, tl.float32)
    group_mean = origin + tl.sum(weighted, 0) / voxels
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, channels * K, BLOCK):
        at = start + i
        inside = at < channels * K
        count = tl.minimum(chunk, S - (at % K) * chunk).to(tl.float32)
        mean = tl.load(mean_NCK + row + at, mask=inside, other=0.0)
        square = tl.load(square_NCK + row + at, mask=inside, other=0.0)
        squares += tl.where(inside, square + count * (mean - group_mean) * (mean - group_mean), 0.0)
    tl.store(mean_NG + n * G + g, group_mean)
    tl.store(rstd_NG + n * G + g, 1.0 / tl.sqrt(tl.sum(squares, 0) / voxels + eps))


@triton.jit
def _normalize(x, y, residual, mean_NG, rstd_NG, weight_C, bias_C, S, C, G, chunk, stride_n, stride_s, stride_c, slope,
               AFFINE: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """The second pass forward: one read, one write."""
    k, block, n = _backwards()
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    first = k * chunk
    end = tl.minimum(first + chunk, S)
    mean, rstd, weight, bias = channel(mean_NG, rstd_NG, weight_C, bias_C, n, c, C, G, AFFINE)
    scale = rstd * weight
    base = n.to(tl.int64) * stride_n + c.to(tl.int64) * stride_c
    for start in range(first, end, BLOCK_S):
        inside = (start + s < end)[:, None] & (c < C)[None, :]
        at = base[None, :] + tl.cast(start, tl.int64) * stride_s + (s * stride_s)[:, None]
        normalize(x, y, residual, at, inside, mean, scale, bias, slope, RESIDUAL)


@triton.jit
def _gradient_sums(dy, x, y, mean_NG, rstd_NG, weight_C, bias_C, plain_NCK, normed_NCK, S, C, G, chunk, stride_n,
                   stride_s, stride_c, slope, AFFINE: tl.constexpr, RESIDUAL: tl.constexpr,
                   BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """The first pass backward: each channel's sums of dy' and dy' * normalised x over one chunk."""
    k, block, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    first = k * chunk
    end = tl.minimum(first + chunk, S)
    mean, rstd, weight, bias = channel(mean_NG, rstd_NG, weight_C, bias_C, n, c, C, G, AFFINE)
    base = n.to(tl.int64) * stride_n + c.to(tl.int64) * stride_c
    plain = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    normed = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in tl.range(first, end, BLOCK_S, num_stages=STAGES):
        inside = (start + s < end)[:, None] & (c < C)[None, :]
        at = base[None, :] + tl.cast(start, tl.int64) * stride_s + (s * stride_s)[:, None]
        gradient, xhat = through_rectifier(dy, x, y, at, inside, mean, rstd, weight, bias, slope, RESIDUAL)
        plain += gradient  # zero outside
        normed += gradient * xhat
    out = (n * C + c) * tl.num_programs(0) + k
    tl.store(plain_NCK + out, tl.sum(plain, 0), mask=c < C)
    tl.store(normed_NCK + out, tl.sum(normed, 0), mask=c < C)


@triton.jit
def _merge_gradients(plain_NCK, normed_NCK, weight_C, plain_NG, normed_NG, dweight_C, dbias_C, N, S, C, K,
                     AFFINE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Weight and bias gradients, and each group's mean of w dy' and w dy' xhat, which dx needs."""
    g, G = tl.program_id(0), tl.num_programs(0)
    channels = C // G
    lane = tl.arange(0, BLOCK_C)
    c = g * channels + lane
    i = tl.arange(0, BLOCK_K)
    weight = tl.full([BLOCK_C], 1.0, tl.float32)
    if AFFINE:
        weight = tl.load(weight_C + c, mask=lane < channels, other=0.0).to(tl.float32)
    voxels = tl.cast(channels, tl.float32) * tl.cast(S, tl.float32)
    dweight = tl.zeros([BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_C], tl.float32)
    for n in range(N):
        # summed after the loop: Triton 3.7 can not compile a sum inside whose result is used twice
        plains = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
        normeds = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
        for start in range(0, K, BLOCK_K):
            at = ((n * C + c) * K + start)[:, None] + i[None, :]
            inside = (lane < channels)[:, None] & (start + i < K)[None, :]
            plains += tl.load(plain_NCK + at, mask=inside, other=0.0)
            normeds += tl.load(normed_NCK + at, mask=inside, other=0.0)
        plain = tl.sum(plains, 1)
        normed = tl.sum(normeds, 1)
        dbias += plain
        dweight += normed
        tl.store(plain_NG + n * G + g, tl.sum(plain * weight, 0) / voxels)
        tl.store(normed_NG + n * G + g, tl.sum(normed * weight, 0) / voxels)
    tl.store(dweight_C + c, dweight, mask=lane < channels)
    tl.store(dbias_C + c, dbias, mask=lane < channels)


@triton.jit
def _input_gradient(dy, x, y, dx, dresidual, mean_NG, rstd_NG, weight_C, bias_C, plain_NG, normed_NG, S, C, G, chunk,
                    stride_n, stride_s, stride_c, slope, AFFINE: tl.constexpr, RESIDUAL: tl.constexpr,
                    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """The second pass backward: dx = rstd * (w dy' - mean(w dy') - xhat * mean(w dy' xhat))."""
    k, block, n = _backwards()
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    first = k * chunk
    end = tl.minimum(first + chunk, S)
    mean, rstd, weight, bias = channel(mean_NG, rstd_NG, weight_C, bias_C, n, c, C, G, AFFINE)
    group = n * G + c // (C // G)
    plain = tl.load(plain_NG + group, mask=c < C, other=0.0)[None, :]
    normed = tl.load(normed_NG + group, mask=c < C, other=0.0)[None, :]
    base = n.to(tl.int64) * stride_n + c.to(tl.int64) * stride_c
    for start in range(first, end, BLOCK_S):
        inside = (start + s < end)[:, None] & (c < C)[None, :]
        at = base[None, :] + tl.cast(start, tl.int64) * stride_s + (s * stride_s)[:, None]
        input_gradient(dy, x, y, dx, dresidual, at, inside, mean, rstd, weight, bias, plain, normed, slope, RESIDUAL)


@torch.library.custom_op("medkernels::group_norm_relu", mutates_args=())
def _forward(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, residual: torch.Tensor | None,
             groups: int, eps: float, slope: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    x = dense(x)
    n, c, s = x.shape[0], x.shape[1], x[0, 0].numel()
    strides = strides_nsc(x)
    y = torch.empty_like(x)
    residual = None if residual is None else like(residual, x)
    mean, rstd = (x.new_empty((n, groups), dtype=torch.float32) for _ in range(2))
    if whole.fits(x, groups, strides[2]):
        whole.forward(x, y, residual, mean, rstd, weight, bias, eps, slope, strides)
        return y, mean, rstd
    block_s, block_c, chunk, k = plan(n, c, s, strides[2])
    grid = (k, triton.cdiv(c, block_c), n)
    mean_NCK, square_NCK = x.new_empty((2, n, c, k), dtype=torch.float32)
    blocks = {"BLOCK_S": block_s, "BLOCK_C": block_c, "num_warps": WARPS}
    _moments[grid](x, mean_NCK, square_NCK, s, c, chunk, *strides, **blocks, STAGES=STAGES)
    block = min(1024, triton.next_power_of_2(c // groups * k))
    _merge_moments[(groups, n)](mean_NCK, square_NCK, mean, rstd, s, c, chunk, k, eps, BLOCK=block)
    _normalize[grid](
        x, y, x if residual is None else residual, mean, rstd, x if weight is None else weight,
        x if bias is None else bias, s, c, groups, chunk, *strides, slope, AFFINE=weight is not None,
        RESIDUAL=residual is not None, **blocks,
    )  # fmt: skip
    return y, mean, rstd


@_forward.register_fake
def _(x, weight, bias, residual, groups, eps, slope):
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(dense(x)), mean, rstd


@torch.library.custom_op("medkernels::group_norm_relu_backward", mutates_args=())
def _backward(
    dy: torch.Tensor, x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    mean: torch.Tensor, rstd: torch.Tensor, slope: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and residual (empty without `y`, the output where a residual was added)."""
    x = dense(x)
    dy = like(dy, x)
    n, c, s, groups = x.shape[0], x.shape[1], x[0, 0].numel(), mean.shape[1]
    strides = strides_nsc(x)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if y is not None else x.new_empty(0)
    kind = torch.float32 if weight is None else weight.dtype
    if whole.fits(x, groups, strides[2]):
        output = None if y is None else like(y, x)
        sums = whole.backward(dy, x, output, dx, dresidual, mean, rstd, weight, bias, slope, strides)
        return dx, sums[0].to(kind), sums[1].to(kind), dresidual
    block_s, block_c, chunk, k = plan(n, c, s, strides[2])
    grid = (k, triton.cdiv(c, block_c), n)
    plain_NCK, normed_NCK = x.new_empty((2, n, c, k), dtype=torch.float32)
    plain_NG, normed_NG = x.new_empty((2, n, groups), dtype=torch.float32)
    dweight, dbias = (x.new_empty(c, dtype=kind) for _ in range(2))
    affine = (x if weight is None else weight, x if bias is None else bias)
    output = x if y is None else like(y, x)
    blocks = {"AFFINE": weight is not None, "RESIDUAL": y is not None, "BLOCK_S": block_s, "BLOCK_C": block_c,
              "num_warps": WARPS}  # fmt: skip
    _gradient_sums[grid](dy, x, output, mean, rstd, *affine, plain_NCK, normed_NCK, s, c, groups, chunk, *strides,
                         slope, **blocks, STAGES=STAGES)  # fmt: skip
    channels = triton.next_power_of_2(c // groups)
    _merge_gradients[(groups,)](
        plain_NCK, normed_NCK, affine[0], plain_NG, normed_NG, dweight, dbias, n, s, c, k, AFFINE=weight is not None,
        BLOCK_C=channels, BLOCK_K=max(1, min(triton.next_power_of_2(k), 2048 // channels)),
    )  # fmt: skip
    _input_gradient[grid](dy, x, output, dx, dresidual, mean, rstd, *affine, plain_NG, normed_NG, s, c, groups, chunk,
                          *strides, slope, **blocks)  # fmt: skip
    return dx, dweight, dbias, dresidual


@_backward.register_fake
def _(dy, x, y, weight, bias, mean, rstd, slope):
    dweight, dbias = (x.new_empty(x.shape[1], dtype=torch.float32 if weight is None else weight.dtype) for _ in "wb")
    dx = torch.empty_like(dense(x))
    return dx, dweight, dbias, x.new_empty(0) if y is None else torch.empty_like(dx)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, residual, _, _, ctx.slope = inputs
    y, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, None if residual is None else y, weight, bias, mean, rstd)


def _differentiate(ctx, dy, _mean, _rstd):
    x, y, weight, bias, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias, dresidual = _backward(dy, x, y, weight, bias, mean, rstd, ctx.slope)
    if weight is None:
        dweight = dbias = None
    return dx, dweight, dbias, None if y is None else dresidual, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def group_norm_relu(x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None,
                    residual: torch.Tensor | None, eps: float, slope: float) -> torch.Tensor:  # fmt: skip
    """See `medkernels.group_norm_relu`."""
    return _forward(x, weight, bias, residual, groups, eps, slope)[0]
