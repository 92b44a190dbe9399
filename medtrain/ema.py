"""An exponential moving average of the weights, evaluated in their place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Ema:
    """average <- d * average + (1 - d) * weights, with d = min(decay, (1 + step) / (10 + step)).

    Parameters and floating buffers: the running statistics of batch normalisation must be of the averaged weights' own
    time. The early ramp keeps the first, random weights out of the average.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.parameters: list[torch.Tensor] = [*model.parameters(), *buffers]
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the average inside this context, and its own weights again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.average, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state(self) -> list[torch.Tensor]:
        """The average's tensors."""
        return self.average

    @torch.no_grad()
    def load(self, state: list[torch.Tensor]) -> None:
        """Take `state`'s values back; raises ValueError where they are of another network."""
        for average, value in zip(self.average, state, strict=True):
            if average.shape != value.shape:
                raise ValueError(f"an average is {tuple(value.shape)} and not {tuple(average.shape)}")
            average.copy_(value)
