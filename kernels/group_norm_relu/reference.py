"""Group normalisation and rectifier in plain torch."""

import torch
from torch.nn import functional


def group_norm_relu(x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None,
                    residual: torch.Tensor | None, eps: float, slope: float) -> torch.Tensor:  # fmt: skip
    """See `medkernels.group_norm_relu`. Without residual and slope the very calls of MONAI's norm and activation."""
    y = functional.group_norm(x, groups, weight, bias, eps)
    if residual is not None:
        y = y + residual
    return functional.relu(y, inplace=True) if slope == 0 else functional.leaky_relu(y, slope, inplace=True)
