"""Trilinear doubling of a feature map and addition of the skip connection in one operator.

Legend of shapes: B batch, C channels, d h w voxels before, D H W = 2d 2h 2w voxels after.
"""

import torch

from medkernels.dispatch import Impl, dtype_refusal, use_fused
from medkernels.upsample_add import reference


def upsample_add(x_BCdhw: torch.Tensor, skip_BCDHW: torch.Tensor, *, impl: Impl = "auto") -> torch.Tensor:
    """y = interpolate(x, scale 2, trilinear, align_corners=False) + skip, as SegResNet's decoder adds them.

    Along each axis y[2i] = 3/4 x[i] + 1/4 x[i-1] and y[2i+1] = 3/4 x[i] + 1/4 x[i+1], indices clamped to the edges.
    float32, bfloat16 or float16; other than in torch the sum is rounded once. y has the dtype that torch promotes to
    and the layout of `skip`, channels first or last. The gradient of x gathers its up to 64 outputs in a fixed order,
    where torch's adds them atomically in a changing one (MONAI #5830). Raises ValueError for shapes that do not fit,
    FusedUnavailable with `impl="fused"` on an unable device or dtype.
    """
    doubled = (*x_BCdhw.shape[:2], *(2 * side for side in x_BCdhw.shape[2:]))
    if x_BCdhw.dim() != 5 or x_BCdhw.numel() == 0 or skip_BCDHW.shape != doubled:
        raise ValueError(f"skip {tuple(skip_BCDHW.shape)} needs to be x {tuple(x_BCdhw.shape)} with sides doubled")
    if use_fused("upsample_add", impl, (x_BCdhw, skip_BCDHW), dtype_refusal(x_BCdhw, skip_BCDHW)):
        from medkernels.upsample_add import fused

        dtype = torch.promote_types(x_BCdhw.dtype, skip_BCDHW.dtype)
        return fused.upsample_add(x_BCdhw.to(dtype), skip_BCDHW.to(dtype))
    return reference.upsample_add(x_BCdhw, skip_BCDHW)
