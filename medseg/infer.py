"""From a prepared volume to region probabilities on the scan's own spacing.

Legend of shapes: C channels, K regions, D H W voxels.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations

import numpy as np
import torch
from torch.nn import functional

from medkernels.window_accumulate import window_accumulate
from medseg.labels import REGIONS
from medseg.recipes import SegRecipe, window_of
from medtrain.strategy import Forward


def region_probs(forward: Forward, image_CDHW: np.ndarray, recipe: SegRecipe, *, flips: bool = False) -> torch.Tensor:
    """Region probabilities (K,D,H,W) float32 by a sliding window with Gaussian weights (MONAI's inferer).

    `flips` averages the logits over all combinations of flips of `evaluate.flip_axes`. Where there is a GPU, scan and
    sums stay on it, unless `model.kernels` is `reference`.
    """
    (probs,) = member_probs([forward], image_CDHW, recipe, flips=flips)
    return probs


def member_probs(forwards: Sequence[Forward], image_CDHW: np.ndarray, recipe: SegRecipe, *,
                 flips: bool = False) -> Iterator[torch.Tensor]:  # fmt: skip
    """`region_probs` of each of several networks; on a GPU in one pass over the windows."""
    axes = recipe.evaluate.flip_axes if flips else ()
    sets: list[Sequence[int]] = [c for n in range(len(axes) + 1) for c in combinations(axes, n)]

    def averaged(forward: Forward, windows: torch.Tensor) -> torch.Tensor:
        dims = [[axis + 2 for axis in chosen] for chosen in sets]
        return torch.stack([forward(windows.flip(d)).flip(d) for d in dims]).mean(0).to(windows.device)

    ways = [partial(averaged, forward) for forward in forwards]
    if torch.cuda.is_available() and recipe.model.kernels != "reference":
        with torch.inference_mode():
            logits = blended_on_device(ways, torch.from_numpy(image_CDHW).to("cuda"), recipe)
            together = [torch.sigmoid(one).cpu() for one in logits]
        yield from together
        return
    for way in ways:
        with torch.inference_mode():
            probs = torch.sigmoid(blended(way, torch.from_numpy(image_CDHW.astype(np.float32)), recipe))
        yield probs


def blended(forward: Forward, image_CDHW: torch.Tensor, recipe: SegRecipe) -> torch.Tensor:
    """Logits (K,D,H,W) float32 by MONAI's inferer, summed on the CPU."""
    from monai.inferers import sliding_window_inference

    logits = sliding_window_inference(
        image_CDHW[None], window_of(recipe), recipe.evaluate.batch, forward, overlap=recipe.evaluate.overlap,
        mode="gaussian", device=torch.device("cpu"),
    )  # fmt: skip
    return logits[0].float()


def blended_on_device(forwards: Sequence[Forward], image_CDHW: torch.Tensor, recipe: SegRecipe) -> torch.Tensor:
    """The same windows and weights as `blended`, with scan and sums where the image lies: logits (M,K,D,H,W) of M
    networks, each window cut out once for all of them.
    """
    from monai.data.utils import compute_importance_map, dense_patch_slices

    window, overlap = window_of(recipe), recipe.evaluate.overlap
    sides = image_CDHW.shape[1:]
    lacks = [max(side - size, 0) for side, size in zip(window, sides, strict=True)]
    image = functional.pad(image_CDHW, [n for lack in reversed(lacks) for n in (lack // 2, lack - lack // 2)])
    size = tuple(image.shape[1:])
    steps = [w if w == n else max(1, int(w * (1 - overlap))) for w, n in zip(window, size, strict=True)]
    starts = [tuple(cut.start for cut in cuts) for cuts in dense_patch_slices(size, window, steps)]
    importance = compute_importance_map(window, mode="gaussian", device=image.device)
    weight = torch.zeros(size, device=image.device)
    total = torch.zeros(len(forwards), len(REGIONS), *size, device=image.device)
    for first in range(0, len(starts), recipe.evaluate.batch):
        some = starts[first : first + recipe.evaluate.batch]
        cuts = [tuple(slice(at, at + side) for at, side in zip(start, window, strict=True)) for start in some]
        windows = torch.stack([image[(slice(None), *cut)] for cut in cuts]).float()
        logits = torch.stack([forward(windows) for forward in forwards])
        window_accumulate(total, weight, logits, some, importance, impl=recipe.model.kernels)
    box = tuple(slice(lack // 2, lack // 2 + side) for lack, side in zip(lacks, sides, strict=True))
    return (total / weight)[(slice(None), slice(None), *box)]


def to_native(probs_KDHW: torch.Tensor, native: Sequence[int]) -> np.ndarray:
    """Linear resampling to the crop box at the scan's own spacing; outer edges coincide. (K,D,H,W) float32."""
    if tuple(probs_KDHW.shape[1:]) != tuple(native):
        probs_KDHW = functional.interpolate(probs_KDHW[None], tuple(native), mode="trilinear", align_corners=False)[0]
    return probs_KDHW.numpy()
