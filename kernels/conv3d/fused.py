"""Convolution of few channels as torch's operators, around `rows.py`, `weights.py` and `points.py`."""

import torch

from medkernels.conv3d import points, rows, weights
from medkernels.layout import like


@torch.library.custom_op("medkernels::conv3d", mutates_args=())
def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if weight.shape[2] == 1:
        return points.convolve(x, weight, bias)
    return rows.convolve(x, rows.pack(weight, x.dtype))


@_forward.register_fake
def _(x, weight, bias):
    return points.empty(x, weight.shape[0]) if weight.shape[2] == 1 else _empty(x, weight.shape[0])


def _empty(x: torch.Tensor, channels: int) -> torch.Tensor:
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


@torch.library.custom_op("medkernels::conv3d_backward", mutates_args=())
def _backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
              wanted: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x (empty unless wanted), weight and bias (empty where there is none)."""
    dx = x.new_empty(0)
    if weight.shape[2] == 1:
        dx = points.input_gradient(dy, x, weight) if wanted else dx
        return dx, *points.gradients(x, dy, weight, bias)
    dy = like(dy, x)
    if wanted:
        dx = rows.convolve(dy, rows.pack(weight, x.dtype, backward=True))
    return dx, weights.weight_gradient(x, dy, weight), weight.new_empty(0)


@_backward.register_fake
def _(dy, x, weight, bias, wanted):
    dx = _empty(x, x.shape[1]) if wanted else x.new_empty(0)
    return dx, torch.empty_like(weight), weight.new_empty(0) if bias is None else torch.empty_like(bias)


def _save(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight, bias)


def _differentiate(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    if wanted and weight.shape[2] == 3 and x.shape[1] == rows.FOLDED:  # rare: the gradient of a scan
        weight_there = weight.to(x.dtype)
        dx = torch.nn.grad.conv3d_input(x.shape, weight_there, dy, padding=1)
        _, dweight, dbias = _backward(dy, x, weight, bias, False)
    else:
        dx, dweight, dbias = _backward(dy, x, weight, bias, wanted)
    return dx if wanted else None, dweight, None if bias is None else dbias


_forward.register_autograd(_differentiate, setup_context=_save)


def conv3d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See `medkernels.conv3d`."""
    return _forward(x, weight, bias)
