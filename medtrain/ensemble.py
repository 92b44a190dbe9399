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


def log_loss_weights(probs_MNK: np.ndarray, target_N: np.ndarray) -> list[float]:
    """Member weights, at least 0 and summing to 1, whose weighted mean has the least log-loss on these N cases.

    probs_MNK: class probabilities of M members. The problem is convex in the weights; from equal weights, SLSQP.
    """
    from scipy.optimize import minimize

    members = len(probs_MNK)
    own = np.clip(np.take_along_axis(probs_MNK, target_N[None, :, None], 2)[..., 0], 1e-7, 1)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = weights @ own
        return float(-np.log(mixed).mean()), -(own / mixed).mean(1)

    found = minimize(loss, np.full(members, 1 / members), jac=True, method="SLSQP", bounds=[(0, 1)] * members,
                     constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like})  # fmt: skip
    weights = np.clip(found.x, 0, None)
    return [float(w) for w in weights / weights.sum()]
