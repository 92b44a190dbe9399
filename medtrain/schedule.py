"""The learning rate as a pure function of the step."""

import math
from collections.abc import Sequence

from medtrain.recipe import Optim


def learning_rate(optim: Optim, step: int, total: int, steps_per_epoch: float, scores: Sequence[float] = ()) -> float:
    """Rate of step `step` of `total`, after validations that gave `scores`.

    poly_epoch: lr0 * (1 - e / E) ** power with the whole epoch e (Myronenko 2018); poly: the same with steps;
    cosine: lr0 * (1 + cos(pi * s / S)) / 2; plateau: see `plateau`. A linear warm-up multiplies the first
    `warmup_steps`.
    """
    done = min(1.0, step / max(1, total))
    if optim.schedule == "poly_epoch":
        epochs = max(1.0, total / steps_per_epoch)
        done = min(1.0, math.floor(step / steps_per_epoch + 1e-9) / epochs)
    rate = optim.lr
    if optim.schedule in ("poly_epoch", "poly"):
        rate *= (1 - done) ** optim.power
    elif optim.schedule == "cosine":
        rate *= (1 + math.cos(math.pi * done)) / 2
    elif optim.schedule == "plateau":
        rate = plateau(rate, scores, optim.factor, optim.patience, optim.min_lr)
    return rate * min(1.0, (step + 1) / (optim.warmup_steps + 1))


def plateau(lr: float, scores: Sequence[float], factor: float, patience: int, least: float) -> float:
    """The rate after these validation scores (larger is better), as torch's ReduceLROnPlateau in mode "max" gives it:
    times `factor`, down to `least`, after more than `patience` scores in a row that did not beat the best by 1e-4.
    """
    best, bad = -math.inf, 0
    for score in scores:
        if score > best * (1 + 1e-4):
            best, bad = score, 0
        else:
            bad += 1
        if bad > patience:
            lr, bad = min(lr, max(lr * factor, least)), 0
    return lr
