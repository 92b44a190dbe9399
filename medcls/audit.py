"""How many test images have a near-duplicate in training, under the group split and under the published random one."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from medcls.cache import ImageCache
from medcls.duplicates import leaked_paths
from medcls.folders import choose_cancer
from medcls.recipes import ImageData
from medcls.selection import make_split, select
from medtrain.errors import UserError

HEAD = ("cancer", "images", "having a near-duplicate", "group split: test", "with a copy in training",
        "random split: test", "with a copy in training, random")  # fmt: skip


def audit_lines(cache: ImageCache, parts: Sequence[ImageData]) -> list[list[object]]:
    """The audit table, head first: one line a cancer of these data settings."""
    lines: list[list[object]] = [list(HEAD)]
    for data in {choose_cancer(cache, part.cancer): part for part in parts}.values():
        images, _, _ = select(cache, choose_cancer(cache, data.cancer))
        groups = cache.near[images]
        _, inverse, count = np.unique(groups, return_inverse=True, return_counts=True)
        line: list[object] = [choose_cancer(cache, data.cancer), len(images), int((count[inverse] > 1).sum())]
        for kind in ("group", "random"):
            try:
                split = make_split(cache, replace(data, split=kind, fold=0, folds=0))
            except UserError:  # too few groups: that split does not exist
                line += ["–", "–"]
                continue
            line += [len(split.test), len(leaked_paths(cache, split))]
        lines.append(line)
    return lines
