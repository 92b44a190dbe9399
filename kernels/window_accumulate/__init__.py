"""Weighted addition of sliding windows into whole volumes, of several members at once.

Legend of shapes: M members, B windows, K regions, d h w voxels of a window, D H W of the volume.
"""

from collections.abc import Sequence

import torch

from medkernels.dispatch import HALF_AND_SINGLE, Impl, use_fused
from medkernels.window_accumulate import reference


def window_accumulate(
    total_MKDHW: torch.Tensor, weight_DHW: torch.Tensor, windows_MBKdhw: torch.Tensor,
    starts: Sequence[tuple[int, int, int]], importance_dhw: torch.Tensor, *, impl: Impl = "auto",
) -> None:  # fmt: skip
    """total[:, :, s:s+d] += importance * windows[:, b] and weight[s:s+d] += importance for each start s, in place.

    Dividing total by weight gives the mean of overlapping windows, as MONAI's sliding_window_inference; with several
    members the windows of one batch are added to all of their volumes in one launch, so no more than a batch of windows
    is ever in memory. Total, weight and importance float32 and contiguous, windows float32, bfloat16 or float16. The
    kernel walks over the volume and adds the windows in the order of `starts`: no atomics, the same bits every time.
    No gradient. Raises ValueError for shapes, dtypes or starts that do not fit, FusedUnavailable on an unable device.
    """
    _check(total_MKDHW, weight_DHW, windows_MBKdhw, starts, importance_dhw)
    if use_fused("window_accumulate", impl, (total_MKDHW, weight_DHW, windows_MBKdhw, importance_dhw)):
        from medkernels.window_accumulate import fused

        fused.window_accumulate(total_MKDHW, weight_DHW, windows_MBKdhw, starts, importance_dhw)
    else:
        reference.window_accumulate(total_MKDHW, weight_DHW, windows_MBKdhw, starts, importance_dhw)


def _check(total: torch.Tensor, weight: torch.Tensor, windows: torch.Tensor, starts: Sequence[tuple[int, int, int]],
           importance: torch.Tensor) -> None:  # fmt: skip
    side, size = windows.shape[3:], weight.shape
    if windows.dim() != 6 or importance.shape != side or total.shape != (windows.shape[0], windows.shape[2], *size):
        raise ValueError(
            f"total {tuple(total.shape)}, weight {tuple(size)}, windows {tuple(windows.shape)} and importance "
            f"{tuple(importance.shape)} need to be (M,K,D,H,W), (D,H,W), (M,B,K,d,h,w) and (d,h,w)"
        )
    singles = (total, weight, importance)
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in singles) or windows.dtype not in HALF_AND_SINGLE:
        raise ValueError("total, weight and importance need to be contiguous float32, windows float32 or half")
    fits = all(0 <= at <= n - m for start in starts for at, n, m in zip(start, size, side, strict=True))
    if len(starts) != windows.shape[1] or not starts or not fits:
        raise ValueError(f"{len(starts)} starts for {windows.shape[1]} windows of {tuple(side)} within {tuple(size)}")
