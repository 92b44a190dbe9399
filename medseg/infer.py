"""From a prepared volume to region probabilities on the scan's own spacing.

Legend of shapes: C channels, K regions, D H W voxels.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import torch
from torch.nn import functional

from medseg.recipes import SegRecipe, window_of


def region_probs(forward: Callable[[torch.Tensor], torch.Tensor], image_CDHW: np.ndarray, recipe: SegRecipe,
                 *, flips: bool = False) -> torch.Tensor:  # fmt: skip
    """Region probabilities (K,D,H,W) float32 by a sliding window with Gaussian weights (MONAI's inferer).

    `flips` averages the logits over all combinations of flips of `evaluate.flip_axes`.
    """
    from monai.inferers import sliding_window_inference

    image = torch.from_numpy(image_CDHW.astype(np.float32))[None]
    axes = recipe.evaluate.flip_axes if flips else ()
    sets: list[Sequence[int]] = [c for n in range(len(axes) + 1) for c in combinations(axes, n)]

    def averaged(windows: torch.Tensor) -> torch.Tensor:
        dims = [[axis + 2 for axis in chosen] for chosen in sets]
        return torch.stack([forward(windows.flip(d)).flip(d) for d in dims]).mean(0).to(windows.device)

    with torch.inference_mode():
        logits = sliding_window_inference(
            image, window_of(recipe), recipe.evaluate.batch, averaged, overlap=recipe.evaluate.overlap,
            mode="gaussian", device=torch.device("cpu"),
        )  # fmt: skip
    return torch.sigmoid(logits[0].float())


def to_native(probs_KDHW: torch.Tensor, native: Sequence[int]) -> np.ndarray:
    """Linear resampling to the crop box at the scan's own spacing; outer edges coincide. (K,D,H,W) float32."""
    if tuple(probs_KDHW.shape[1:]) != tuple(native):
        probs_KDHW = functional.interpolate(probs_KDHW[None], tuple(native), mode="trilinear", align_corners=False)[0]
    return probs_KDHW.numpy()
