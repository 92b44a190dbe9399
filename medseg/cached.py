"""What a cache of scans tells of its labels and cases, checked: it may come from anywhere."""

import math

from medseg.cases import CHANNELS
from medseg.geometry import Grid
from medseg.labels import LabelMap
from medtrain.cache import Cache
from medtrain.errors import UserError


def read_label_map(cache: Cache) -> LabelMap:
    """What a cache's labels mean; raises UserError where it does not tell, or has other channels than ours."""
    try:
        label_map = LabelMap.from_dict(cache.labels)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{cache.path} does not tell what its labels mean: prepare it again.") from None
    if len(cache.channels) != len(CHANNELS):
        raise UserError(
            f"{cache.path} has {len(cache.channels)} channels, {len(CHANNELS)} are needed: prepare it again."
        )
    return label_map


def read_grid(cache: Cache, case: str) -> Grid:
    """The way back to a case's own grid; raises UserError where it does not lead there."""
    facts = cache.facts(case)
    try:
        grid = Grid.from_dict(facts["grid"])
        fits = grid.native == cache.array(case, reference_name(cache, case)).shape
        fits = fits and all(0 < mm < math.inf for mm in grid.voxel_mm)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise UserError(f"{cache.path}: case {case} is damaged (its grid): prepare it again.")
    return grid


def reference_name(cache: Cache, case: str) -> str:
    """Which array holds the true label in the crop box at the scan's own spacing."""
    return "label_native" if cache.has(case, "label_native") else "label"
