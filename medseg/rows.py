"""The parameter row of an augmented volume: the one float32 vector that DALI, NumPy and kernels all read.

A row holds everything random about a sample, so whoever applies it needs no random numbers. Operations are applied
in this order; each is the identity at the value given in brackets:

    matrix  (12)  output voxel -> input voxel of the patch, 3x4, pixel-centre convention, D H W order [not applied
                  when `warp` is 0]
    flip    (3)   reverse D, H, W [0]
    noise   (1)   standard deviation of Gaussian noise; the unit noise field comes beside the row [0]
    blur    (1)   Gaussian sigma in voxels [0]
    contrast(C)   x <- (x - mean) * contrast + mean, per channel over the patch [1]
    low     (1)   zoom factor of a low-resolution copy: linear down without smoothing, linear up [1]
    gamma   (C)   x <- range * ((x - min) / range) ** gamma + min, per channel over the patch [1]
    scale   (C)   x <- x * scale [1]
    shift   (C)   x <- x + shift [0]
"""

from collections.abc import Mapping

import numpy as np

from medtrain.rows import filled, slices

ORDER = ("warp", "flip", "noise", "blur", "contrast", "low", "gamma", "intensity")


def layout(channels: int) -> dict[str, slice]:
    """Where each field lies in a row."""
    sizes = {
        "warp": 1, "matrix": 12, "flip": 3, "noise": 1, "blur": 1, "contrast": channels,
        "low": 1, "gamma": channels, "scale": channels, "shift": channels,
    }  # fmt: skip
    return slices(sizes)


def pack(fields: Mapping[str, object], channels: int) -> np.ndarray:
    """A row from its fields; what is not given is the identity."""
    return filled(layout(channels), ("contrast", "low", "gamma", "scale"), fields)
