"""What the chunked kernels and those of one launch share.

Legend of shapes: N samples, C channels, G groups.
"""

import triton
import triton.language as tl


@triton.jit
def affine(weight_C, bias_C, c, C, AFFINE: tl.constexpr):
    """Weight and bias of each channel of a block, as a row."""
    if AFFINE:
        weight = tl.load(weight_C + c, mask=c < C, other=0.0).to(tl.float32)
        bias = tl.load(bias_C + c, mask=c < C, other=0.0).to(tl.float32)
    else:
        weight = tl.full(c.shape, 1.0, tl.float32)
        bias = tl.zeros(c.shape, tl.float32)
    return weight[None, :], bias[None, :]


@triton.jit
def channel(mean_NG, rstd_NG, weight_C, bias_C, n, c, C, G, AFFINE: tl.constexpr):
    """Mean, 1/std, weight and bias of each channel of a block, as rows."""
    at = n * G + c // (C // G)
    mean = tl.load(mean_NG + at, mask=c < C, other=0.0)
    rstd = tl.load(rstd_NG + at, mask=c < C, other=0.0)
    weight, bias = affine(weight_C, bias_C, c, C, AFFINE)
    return mean[None, :], rstd[None, :], weight, bias


@triton.jit
def through_rectifier(dy, x, y, at, inside, mean, rstd, weight, bias, slope, RESIDUAL: tl.constexpr):
    """The gradient before the rectifier, and the normalised input. The mask is recomputed: from x, or where a residual
    was added from the output's sign, which the next convolution keeps in any case."""
    away = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean
    gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:  # noqa: SIM108 - both branches of a conditional expression would be compiled
        value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    else:
        value = away * (rstd * weight) + bias
    return tl.where(value > 0, gradient, gradient * slope), away * rstd
