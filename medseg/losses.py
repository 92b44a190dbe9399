"""Losses over region logits, from raw label codes.

Legend of shapes: B batch, K regions (TC, WT, ET), D H W voxels.
"""

from functools import lru_cache

import torch
from torch.nn import functional

from medkernels.dispatch import Impl
from medkernels.region_dice import region_dice, runs_fused
from medseg.labels import REGIONS, LabelMap


def region_targets(label_BDHW: torch.Tensor, label_map: LabelMap) -> torch.Tensor:
    """Region masks (B,3,D,H,W) float32 from raw codes."""
    masks = []
    for region in REGIONS:
        codes = label_map.codes(region)
        mask = label_BDHW == codes[0]
        for code in codes[1:]:
            mask = mask | (label_BDHW == code)
        masks.append(mask)
    return torch.stack(masks, 1).float()


@lru_cache(maxsize=1)
def _soft_dice() -> torch.nn.Module:
    from monai.losses import DiceLoss

    # smooth_nr 0 and the squared denominator are the published choice (Myronenko 2018)
    return DiceLoss(sigmoid=True, squared_pred=True, smooth_nr=0.0, smooth_dr=1e-5)


def supervised_loss(logits: torch.Tensor, label_BDHW: torch.Tensor, label_map: LabelMap, kind: str,
                    kernels: Impl = "auto") -> torch.Tensor:  # fmt: skip
    """`region_loss` of logits (B,K,D,H,W), or of (B,N,K,D,H,W) with weights 1, 1/2, 1/4, ... that sum to one (Isensee
    2021: deep supervision).
    """
    if logits.ndim == 5:
        return region_loss(logits, label_BDHW, label_map, kind, kernels)
    weights = [0.5**n for n in range(logits.shape[1])]
    losses = [w * region_loss(level, label_BDHW, label_map, kind, kernels) for w, level in
              zip(weights, logits.unbind(1), strict=True)]  # fmt: skip
    return torch.stack(losses).sum() / sum(weights)


def region_loss(logits_BKDHW: torch.Tensor, label_BDHW: torch.Tensor, label_map: LabelMap, kind: str,
                kernels: Impl = "auto") -> torch.Tensor:  # fmt: skip
    """Mean over samples and regions of 1 - 2 sum(p t) / (sum(p^2) + sum(t^2)), plus binary cross-entropy if asked.

    The mean is over samples, not over the batch as one, so it is the same however a batch is spread over ranks.
    `kernels` says whether MONAI's loss or the kernel that equals it is taken.
    """
    regions = [label_map.codes(region) for region in REGIONS]
    if runs_fused(logits_BKDHW, label_BDHW, regions, kernels):
        return region_dice(logits_BKDHW, label_BDHW, regions, bce=kind == "dice_bce", impl="fused")
    targets = region_targets(label_BDHW, label_map)
    loss = _soft_dice()(logits_BKDHW, targets)
    if kind == "dice_bce":
        loss = loss + functional.binary_cross_entropy_with_logits(logits_BKDHW, targets)
    return loss
