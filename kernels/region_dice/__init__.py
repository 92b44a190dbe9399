"""Soft Dice (and cross-entropy) of nested regions, straight from raw label codes.

Legend of shapes: B batch, K regions, D H W voxels.
"""

from collections.abc import Sequence

import torch

from medkernels.dispatch import Impl, dtype_refusal, use_fused
from medkernels.region_dice import reference

MOST_REGIONS, MOST_CODE = 4, 30  # a region is a 32-bit set of codes in the kernel

Regions = Sequence[Sequence[int]]


def region_dice(
    logits_BKDHW: torch.Tensor, label_BDHW: torch.Tensor, regions: Regions, *, squared: bool = True,
    per_sample: bool = True, smooth_nr: float = 0.0, smooth_dr: float = 1e-5, bce: bool = False, impl: Impl = "auto",
) -> torch.Tensor:  # fmt: skip
    """Mean of 1 - (2 sum(p t) + smooth_nr) / (sum(p^2) + sum(t) + smooth_dr), a scalar; float32, or float64 for that.

    p = sigmoid(logits), t = 1 where a voxel's code is one of `regions[k]` (MONAI's DiceLoss with sigmoid; Milletari et
    al., "V-Net", 2016, for the squares; without `squared` sum(p) in their place). Sums are over the voxels of each
    sample, or of the whole batch without `per_sample`; the mean is over what is left. `bce` adds the mean binary
    cross-entropy of all voxels and regions. Logits float32, bfloat16 or float16, label uint8 codes.

    Fused: one pass forward, one backward, no masks in memory, sums in a fixed order. It takes up to 4 regions of codes
    up to 30. Raises ValueError for shapes that do not fit, FusedUnavailable for what `impl="fused"` can not do.
    """
    if logits_BKDHW.shape[0] != label_BDHW.shape[0] or logits_BKDHW.shape[2:] != label_BDHW.shape[1:]:
        raise ValueError(f"logits {tuple(logits_BKDHW.shape)} do not fit labels {tuple(label_BDHW.shape)}")
    if logits_BKDHW.shape[1] != len(regions) or not all(regions) or logits_BKDHW.numel() == 0:
        raise ValueError(f"logits {tuple(logits_BKDHW.shape)} need to be {len(regions)} regions, none without a code")
    arguments = (squared, per_sample, smooth_nr, smooth_dr, bce)
    if runs_fused(logits_BKDHW, label_BDHW, regions, impl):
        from medkernels.region_dice import fused

        return fused.region_dice(logits_BKDHW, label_BDHW, regions, *arguments)
    return reference.region_dice(logits_BKDHW, label_BDHW, regions, *arguments)


def runs_fused(logits_BKDHW: torch.Tensor, label_BDHW: torch.Tensor, regions: Regions, impl: Impl) -> bool:
    """Whether `region_dice` takes the kernel; raises as it does."""
    refusal = dtype_refusal(logits_BKDHW)
    if label_BDHW.dtype != torch.uint8:
        refusal = f"labels are {label_BDHW.dtype}, not uint8"
    elif len(regions) > MOST_REGIONS or any(not 0 <= code <= MOST_CODE for codes in regions for code in codes):
        refusal = f"more than {MOST_REGIONS} regions, or a code outside 0..{MOST_CODE}"
    return use_fused("region_dice", impl, (logits_BKDHW, label_BDHW), refusal)
