"""Trilinear doubling and addition in plain torch."""

import torch
from torch.nn import functional


def upsample_add(x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """See `medkernels.upsample_add`; the very call of MONAI's UpSample."""
    return functional.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False) + skip
