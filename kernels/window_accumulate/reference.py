"""Weighted addition of sliding windows in plain torch, one after the other."""

from collections.abc import Sequence

import torch


def window_accumulate(
    total_MKDHW: torch.Tensor, weight_DHW: torch.Tensor, windows_MBKdhw: torch.Tensor,
    starts: Sequence[tuple[int, int, int]], importance_dhw: torch.Tensor,
) -> None:  # fmt: skip
    """See `medkernels.window_accumulate`."""
    for window_MKdhw, start in zip(windows_MBKdhw.unbind(1), starts, strict=True):
        i, j, k = (slice(at, at + side) for at, side in zip(start, importance_dhw.shape, strict=True))
        total_MKDHW[..., i, j, k] += importance_dhw * window_MKdhw
        weight_DHW[i, j, k] += importance_dhw
