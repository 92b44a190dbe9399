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

from collections.abc import Iterable, Mapping

import numpy as np

ORDER = ("warp", "flip", "noise", "blur", "contrast", "low", "gamma", "intensity")


def layout(channels: int) -> dict[str, slice]:
    """Where each field lies in a row."""
    sizes = {
        "warp": 1, "matrix": 12, "flip": 3, "noise": 1, "blur": 1, "contrast": channels,
        "low": 1, "gamma": channels, "scale": channels, "shift": channels,
    }  # fmt: skip
    return _slices(sizes)


def pack(fields: Mapping[str, object], channels: int) -> np.ndarray:
    """A row from its fields; what is not given is the identity."""
    return _filled(layout(channels), ("contrast", "low", "gamma", "scale"), fields)


# The parameter row of an augmented image, applied in this order (identity in brackets):
#
#     roi     (4)  top, left, height, width in pixels of the upright image; resized to the square [all of it]
#     turn    (1)  exchange rows and columns [0]
#     angle   (1)  degrees of rotation about the centre, counter-clockwise; outside is black [0]
#     flip    (2)  reverse rows, columns [0]
#     colour  (3)  brightness, contrast, saturation: see `medcls.augment.apply` [1]
#     mix     (1)  share of the image itself where it is mixed with its partner, by the task and not the loader [1]
IMAGE_FIELDS = {"roi": 4, "turn": 1, "angle": 1, "flip": 2, "colour": 3, "mix": 1}
IMAGE_ORDER = ("turn", "angle", "flip", "colour", "mix")


def image_layout() -> dict[str, slice]:
    """Where each field lies in an image's row."""
    return _slices(IMAGE_FIELDS)


def pack_image(fields: Mapping[str, object]) -> np.ndarray:
    """An image's row from its fields; what is not given is the identity. `roi` must be given."""
    return _filled(image_layout(), ("colour", "mix"), fields)


def _slices(sizes: Mapping[str, int]) -> dict[str, slice]:
    """Fields of these sizes one behind another."""
    slices, at = {}, 0
    for name, size in sizes.items():
        slices[name] = slice(at, at + size)
        at += size
    return slices


def _filled(slices: Mapping[str, slice], ones: Iterable[str], fields: Mapping[str, object]) -> np.ndarray:
    """A row of these fields; what is not given is 1 where `ones` names it, else 0."""
    row = np.zeros(max(where.stop for where in slices.values()), np.float32)
    for name in ones:
        row[slices[name]] = 1
    for name, value in fields.items():
        row[slices[name]] = np.ravel(np.asarray(value, np.float32))
    return row
