"""Group normalisation and rectifier of small groups in Triton: one launch forward, one backward.

A program owns a whole group of one sample: it sums in a first loop and writes in a second, whose reads come from the
cache. Where groups are small, three launches of the chunked kernels would take longer than the work.

Legend of shapes: N samples, C channels, G groups, S voxels of a sample.
"""

import torch
import triton
import triton.language as tl

from medkernels.group_norm_relu.parts import affine, channel, input_gradient, normalize, through_rectifier

MOST = 8192  # elements of a group, one tile: more are better shared by several programs
SECTOR = 32  # bytes that memory gives at once: shorter runs would be read in vain
TILE = 8192  # elements that a program holds at once
WARPS = 16


def fits(x: torch.Tensor, groups: int, stride_c: int) -> bool:
    """Whether a group of a dense tensor (N,C,*) is small, and its channels lie together or apart by whole volumes."""
    channels, voxels = x.shape[1] // groups, x[0, 0].numel()
    return channels * voxels <= MOST and (stride_c != 1 or channels * x.element_size() >= SECTOR)


def plan(channels: int, voxels: int) -> dict[str, int]:
    """The tile of a group and the warps of a program."""
    block_c = triton.next_power_of_2(channels)
    block_s = max(1, min(TILE // block_c, triton.next_power_of_2(voxels)))
    return {"BLOCK_S": block_s, "BLOCK_C": block_c, "num_warps": max(1, min(WARPS, block_s * block_c // 512))}


@triton.jit
def _forward(x, y, residual, mean_NG, rstd_NG, weight_C, bias_C, S, C, eps, stride_n, stride_s, stride_c, slope,
             CHANNELS: tl.constexpr, AFFINE: tl.constexpr, RESIDUAL: tl.constexpr,
             BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """The sums are of distances from the group's first voxel, so a large mean costs no digits."""
    g, n, G = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    lane, s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    c = g * CHANNELS + lane
    base = n.to(tl.int64) * stride_n + c.to(tl.int64) * stride_c
    origin = tl.load(x + n.to(tl.int64) * stride_n + (g * CHANNELS).to(tl.int64) * stride_c).to(tl.float32)
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(0, S, BLOCK_S):
        inside = (start + s < S)[:, None] & (lane < CHANNELS)[None, :]
        at = base[None, :] + tl.cast(start, tl.int64) * stride_s + (s * stride_s)[:, None]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        away = tl.where(inside, value - origin, 0.0)
        total += away
        square += away * away
    voxels = tl.cast(S, tl.float32) * CHANNELS
    shift = tl.sum(tl.sum(total, 0), 0) / voxels
    variance = tl.maximum(tl.sum(tl.sum(square, 0), 0) / voxels - shift * shift, 0.0)
    mean, rstd = origin + shift, 1.0 / tl.sqrt(variance + eps)
    tl.store(mean_NG + n * G + g, mean)
    tl.store(rstd_NG + n * G + g, rstd)
    weight, bias = affine(weight_C, bias_C, c, C, AFFINE)
    scale = rstd * weight
    for start in range(0, S, BLOCK_S):
        inside = (start + s < S)[:, None] & (lane < CHANNELS)[None, :]
        at = base[None, :] + tl.cast(start, tl.int64) * stride_s + (s * stride_s)[:, None]
        normalize(x, y, residual, at, inside, mean, scale, bias, slope, RESIDUAL)


@triton.jit
def _backward(dy, x, y, dx, dresidual, mean_NG, rstd_NG, weight_C, bias_C, plain_NC, normed_NC, S, C, stride_n,
              stride_s, stride_c, slope, CHANNELS: tl.constexpr, AFFINE: tl.constexpr, RESIDUAL: tl.constexpr,
              BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Each channel's sums of dy' and dy' * normalised x, then dx, as the chunked kernels have it."""
    g, n, G = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    lane, s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    c = g * CHANNELS + lane
    mean, rstd, weight, bias = channel(mean_NG, rstd_NG, weight_C, bias_C, n, c, C, G, AFFINE)
    base = n.to(tl.int64) * stride_n + c.to(tl.int64) * stride_c
    plains = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    normeds = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(0, S, BLOCK_S):
        inside = (start + s < S)[:, None] & (lane < CHANNELS)[None, :]
        at = base[None, :] + tl.cast(start, tl.int64) * stride_s + (s * stride_s)[:, None]
        gradient, xhat = through_rectifier(dy, x, y, at, inside, mean, rstd, weight, bias, slope, RESIDUAL)
        plains += gradient  # zero outside
        normeds += gradient * xhat
    plain_C, normed_C = tl.sum(plains, 0), tl.sum(normeds, 0)
    tl.store(plain_NC + n * C + c, plain_C, mask=lane < CHANNELS)
    tl.store(normed_NC + n * C + c, normed_C, mask=lane < CHANNELS)
    voxels = tl.cast(S, tl.float32) * CHANNELS
    plain = tl.sum(plain_C[None, :] * weight, 1)[:, None] / voxels
    normed = tl.sum(normed_C[None, :] * weight, 1)[:, None] / voxels
    for start in range(0, S, BLOCK_S):
        inside = (start + s < S)[:, None] & (lane < CHANNELS)[None, :]
        at = base[None, :] + tl.cast(start, tl.int64) * stride_s + (s * stride_s)[:, None]
        input_gradient(dy, x, y, dx, dresidual, at, inside, mean, rstd, weight, bias, plain, normed, slope, RESIDUAL)


def forward(x: torch.Tensor, y: torch.Tensor, residual: torch.Tensor | None, mean_NG: torch.Tensor,
            rstd_NG: torch.Tensor, weight_C: torch.Tensor | None, bias_C: torch.Tensor | None, eps: float,
            slope: float, strides: tuple[int, int, int]) -> None:  # fmt: skip
    """Fill y and the statistics; x, y and residual share the strides of sample, voxel and channel."""
    (n, c), s, groups = x.shape[:2], x[0, 0].numel(), mean_NG.shape[1]
    _forward[(groups, n)](
        x, y, x if residual is None else residual, mean_NG, rstd_NG, x if weight_C is None else weight_C,
        x if bias_C is None else bias_C, s, c, eps, *strides, slope, AFFINE=weight_C is not None,
        RESIDUAL=residual is not None, CHANNELS=c // groups, **plan(c // groups, s),
    )  # fmt: skip


def backward(dy: torch.Tensor, x: torch.Tensor, y: torch.Tensor | None, dx: torch.Tensor, dresidual: torch.Tensor,
             mean_NG: torch.Tensor, rstd_NG: torch.Tensor, weight_C: torch.Tensor | None, bias_C: torch.Tensor | None,
             slope: float, strides: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Fill dx and dresidual; returns the gradients of weight and bias (C,), float32."""
    (n, c), s, groups = x.shape[:2], x[0, 0].numel(), mean_NG.shape[1]
    plain_NC, normed_NC = x.new_empty((2, n, c), dtype=torch.float32)
    _backward[(groups, n)](
        dy, x, x if y is None else y, dx, dresidual, mean_NG, rstd_NG, x if weight_C is None else weight_C,
        x if bias_C is None else bias_C, plain_NC, normed_NC, s, c, *strides, slope, AFFINE=weight_C is not None,
        RESIDUAL=y is not None, CHANNELS=c // groups, **plan(c // groups, s),
    )  # fmt: skip
    return normed_NC.sum(0), plain_NC.sum(0)
