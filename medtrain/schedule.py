"""The learning rate as a pure function of the step."""

import math

from medtrain.recipe import Optim


def learning_rate(optim: Optim, step: int, total: int, steps_per_epoch: float) -> float:
    """Rate of step `step` of `total`.

    poly_epoch: lr0 * (1 - e / E) ** power with the whole epoch e (Myronenko 2018); poly: the same with steps;
    cosine: lr0 * (1 + cos(pi * s / S)) / 2. A linear warm-up multiplies the first `warmup_steps`.
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
    return rate * min(1.0, (step + 1) / (optim.warmup_steps + 1))
