"""Scores of one case: Dice of TC, WT and ET between two label maps."""

import numpy as np

from medseg.labels import REGIONS, LabelMap


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """2 |P and R| / (|P| + |R|) of two boolean masks of one shape (Dice 1945).

    Both empty: 1. Reference empty, prediction not: 0. Prediction empty, reference not: 0.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction is {prediction.shape}, reference {reference.shape}")
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    if total == 0:
        return 1.0
    return 2 * int(np.count_nonzero(prediction & reference)) / total


def score_case(prediction: np.ndarray, reference: np.ndarray, label_map: LabelMap) -> dict[str, float]:
    """Dice of each region, and their mean, from two label maps of raw codes on one grid."""
    pairs = zip(REGIONS, label_map.regions(prediction), label_map.regions(reference), strict=True)
    scores = {region: dice(p, r) for region, p, r in pairs}
    return {"mean": sum(scores.values()) / len(scores), **scores}
