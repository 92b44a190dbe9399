"""Group normalisation and rectifier in plain torch."""

import torch
from torch.nn import functional


def group_norm_relu(x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None,
                    residual: torch.Tensor | None, eps: float, slope: float) -> torch.Tensor:  # fmt: skip
    """See `medkernels.group_norm_relu`. Without residual and slope the very calls of MONAI's norm and activation."""
    return _end(functional.group_norm(x, groups, weight, bias, eps), residual, slope)


def instance_norm_leaky_relu(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
                             residual: torch.Tensor | None, eps: float, slope: float) -> torch.Tensor:  # fmt: skip
    """See `medkernels.instance_norm_leaky_relu`. The very calls of MONAI's blocks of nnU-Net's kind."""
    return _end(functional.instance_norm(x, weight=weight, bias=bias, eps=eps), residual, slope)


def _end(y: torch.Tensor, residual: torch.Tensor | None, slope: float) -> torch.Tensor:
    if residual is not None:
        y += residual
    if slope == 1:
        return y
    return functional.relu(y, inplace=True) if slope == 0 else functional.leaky_relu(y, slope, inplace=True)
