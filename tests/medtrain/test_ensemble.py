"""Weights that minimise validation log-loss, against a plain search."""

import numpy as np
import pytest

from medtrain.ensemble import log_loss_weights


def loss(weights: np.ndarray, probs_MNK: np.ndarray, target_N: np.ndarray) -> float:
    mixed = np.tensordot(weights, probs_MNK, 1)
    return float(-np.log(mixed[np.arange(len(target_N)), target_N]).mean())


def test_the_weights_are_the_best_on_a_grid() -> None:
    rng = np.random.default_rng(0)
    target = rng.integers(0, 3, 300)
    sharp = np.eye(3)[target] * 4
    probs = np.stack([np.exp(k * sharp + rng.normal(0, 2, (300, 3))) for k in (0.2, 0.5, 0.0)])
    probs /= probs.sum(2, keepdims=True)
    weights = np.array(log_loss_weights(probs, target))
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    steps = np.linspace(0, 1, 41)
    grid = [np.array([a, b, 1 - a - b]) for a in steps for b in steps if a + b <= 1 + 1e-9]
    assert loss(weights, probs, target) <= min(loss(np.clip(w, 0, 1), probs, target) for w in grid) + 1e-6


def test_a_perfect_member_takes_all_and_a_certain_mistake_is_finite() -> None:
    target = np.array([0, 1, 0, 1])
    perfect, wrong = np.eye(2)[target], np.eye(2)[1 - target]
    assert log_loss_weights(np.stack([wrong, perfect]), target) == pytest.approx([0, 1], abs=1e-3)
    assert np.isfinite(log_loss_weights(np.stack([wrong, wrong]), target)).all()
    assert log_loss_weights(perfect[None], target) == [1.0]
