"""Which images of a cache a recipe is about, and how they are split."""

import numpy as np

from medcls.cache import ImageCache
from medcls.folders import choose_cancer
from medcls.recipes import ALL_CANCERS, ImageData
from medtrain.errors import UserError
from medtrain.splits import Split, TooFewGroups, split_groups


def select(cache: ImageCache, cancer: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(indices of the cancer's images, their classes counted from 0, names of the classes)."""
    numbers = [n for n, (owner, _) in enumerate(cache.classes) if cancer in (ALL_CANCERS, owner)]
    images = np.flatnonzero(np.isin(cache.target, numbers))
    names = [cache.classes[n][1] for n in numbers]
    if len(set(names)) < len(names):  # two cancers may both have a "normal"
        names = ["/".join(cache.classes[n]) for n in numbers]
    return images, cache.target[images].astype(np.int64) - min(numbers), names


def make_split(cache: ImageCache, data: ImageData) -> Split:
    """The recipe's split over image paths; raises UserError where a class has too few images for it."""
    images, targets, names = select(cache, choose_cancer(cache, data.cancer))
    groups = images if data.split == "random" else cache.group[images]
    ids = [cache.ids[n] for n in images]
    try:
        return split_groups(
            ids, groups.tolist(), targets.tolist(), seed=data.split_seed, fold=data.fold, folds=data.folds,
            val_fraction=data.val_fraction, test_fraction=data.test_fraction,
        )  # fmt: skip
    except TooFewGroups as error:
        what = "images" if data.split == "random" else "groups (near-duplicates, or a patient's images)"
        words = f"class {names[error.stratum]} has {error.groups} {what} of its own, {error.parts} parts need one each"
        raise UserError(f"{cache.path} can not be split: {words}; add images of it.") from None
    except ValueError as error:
        raise UserError(f"{cache.path} can not be split so: {error}; --set data.val_fraction or the like.") from None
