"""Combine members, one case at a time, in bounded memory."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np


def weighted_mean(predictions: Iterable[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """sum(w_i p_i) / sum(w_i) in float32; holds one prediction and the sum, whatever the number of members.

    Raises ValueError where counts or shapes differ or the weights do not sum to a positive number.
    """
    total: np.ndarray | None = None
    used = 0
    if not sum(weights) > 0 or min(weights) < 0:
        raise ValueError(f"weights {list(weights)} must be at least 0, and one of them above")
    for prediction in predictions:
        if total is None:
            total = np.zeros(prediction.shape, np.float32)
        if prediction.shape != total.shape or used >= len(weights):
            raise ValueError("members' predictions differ in shape, or there are more of them than weights")
        total += np.float32(weights[used]) * prediction.astype(np.float32, copy=False)
        used += 1
    if total is None or used != len(weights):
        raise ValueError(f"{used} predictions for {len(weights)} weights")
    return total / np.float32(sum(weights))


def weights_from(scores: Mapping[str, float | None], how: str) -> list[float]:
    """Member weights: `equal`, or `validation`, the members' own validation scores (never those of the judged rows).

    Raises ValueError where a member has no validation score.
    """
    if how == "equal":
        return [1.0] * len(scores)
    missing = [name for name, score in scores.items() if score is None]
    if missing:
        raise ValueError(f"member {missing[0]} has no validation score")
    return [float(score) for score in scores.values() if score is not None]
