"""Soft Dice of regions in plain torch, with the masks in memory.

Legend of shapes: B batch, K regions, D H W voxels.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional


def region_dice(
    logits_BKDHW: torch.Tensor, label_BDHW: torch.Tensor, regions: Sequence[Sequence[int]], squared: bool,
    per_sample: bool, smooth_nr: float, smooth_dr: float, bce: bool,
) -> torch.Tensor:  # fmt: skip
    """See `medkernels.region_dice`."""
    logits = logits_BKDHW if logits_BKDHW.dtype == torch.float64 else logits_BKDHW.float()
    masks = [torch.stack([label_BDHW == code for code in codes]).any(0) for codes in regions]
    truth = torch.stack(masks, 1).to(logits.dtype)
    probs = torch.sigmoid(logits)
    axes = tuple(range(2, logits.dim())) if per_sample else (0, *range(2, logits.dim()))
    size = (probs * probs if squared else probs).sum(axes) + truth.sum(axes)
    loss = (1 - (2 * (probs * truth).sum(axes) + smooth_nr) / (size + smooth_dr)).mean()
    return loss + functional.binary_cross_entropy_with_logits(logits, truth) if bce else loss
