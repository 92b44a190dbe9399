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
def normalize(x, y, residual, at, inside, mean, scale, bias, slope, RESIDUAL: tl.constexpr):
    """One block of the output from one of the input: scaled, shifted, added to, rectified, in float32."""
    value = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean) * scale + bias
    if RESIDUAL:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(value > 0, value, value * slope)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


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


@triton.jit
def input_gradient(dy, x, y, dx, dresidual, at, inside, mean, rstd, weight, bias, plain, normed, slope,
                   RESIDUAL: tl.constexpr):  # fmt: skip
    """One block of dx = rstd * (w dy' - mean(w dy') - xhat * mean(w dy' xhat)), and the residual's gradient, dy'."""
    gradient, xhat = through_rectifier(dy, x, y, at, inside, mean, rstd, weight, bias, slope, RESIDUAL)
    if RESIDUAL:
        tl.store(dresidual + at, gradient.to(dresidual.dtype.element_ty), mask=inside)
    value = rstd * (weight * gradient - plain - xhat * normed)
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside)
