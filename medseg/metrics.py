"""Scores of one case: Dice and HD95 of TC, WT and ET between two label maps."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from medseg.labels import REGIONS, LabelMap

DICE = ("mean", *REGIONS)
HD95 = tuple(f"HD95 {region}" for region in REGIONS)
# The diagonal of a BraTS volume, 240 x 240 x 155 voxels of 1 mm: the field's distance where one mask is empty.
ONE_EMPTY_MM = 373.13


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """2 |P and R| / (|P| + |R|) of two boolean masks of one shape (Dice 1945).

    Both empty: 1. Reference empty, prediction not: 0. Prediction empty, reference not: 0.
    """
    _same_shape(prediction, reference)
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    if total == 0:
        return 1.0
    return 2 * int(np.count_nonzero(prediction & reference)) / total


def hd95(prediction: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """The 95th percentile of the distances in mm from each surface to the other, the larger of the two directions, of
    two boolean masks (D,H,W) on one grid with voxels of `spacing_mm` (MONAI's `compute_hausdorff_distance`).

    A surface is the voxels with a face to the background or to the outside of the volume; distances go from voxel
    centre to voxel centre. Both empty: 0. One empty: 373.13 mm, the diagonal of a BraTS volume, as in BraTS.
    """
    _same_shape(prediction, reference)
    if not prediction.any() or not reference.any():
        return ONE_EMPTY_MM if prediction.any() or reference.any() else 0.0
    surfaces = [_surface(mask, spacing_mm) for mask in (prediction, reference)]
    # trees of points, not maps of distances: a stray voxel far away then costs nothing
    trees = [KDTree(points) for points in surfaces]
    ways = (trees[1].query(surfaces[0])[0], trees[0].query(surfaces[1])[0])
    return max(float(np.percentile(distances, 95)) for distances in ways)


def _surface(mask: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Centres (N,3) in mm of a mask's surface voxels."""
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    inside = mask[box]
    edge = inside & ~ndimage.binary_erosion(inside)  # what lies outside of the box counts as background
    return (np.argwhere(edge) + [cut.start for cut in box]) * np.asarray(spacing_mm, float)


def _same_shape(prediction: np.ndarray, reference: np.ndarray) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction is {prediction.shape}, reference {reference.shape}")


def score_case(prediction: np.ndarray, reference: np.ndarray, label_map: LabelMap,
               spacing_mm: Sequence[float] | None = None) -> dict[str, float]:  # fmt: skip
    """Dice of each region, and their mean, from two label maps of raw codes on one grid; with the voxels' size along
    the arrays' axes, HD95 of each region (mm) too.
    """
    pairs = list(zip(label_map.regions(prediction), label_map.regions(reference), strict=True))
    scores = [dice(p, r) for p, r in pairs]
    told = dict(zip(DICE, [sum(scores) / len(scores), *scores], strict=True))
    if spacing_mm is None:
        return told
    return told | {name: hd95(p, r, spacing_mm) for name, (p, r) in zip(HD95, pairs, strict=True)}
