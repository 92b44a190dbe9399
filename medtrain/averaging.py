"""Gradients of several processes, averaged in one piece once the backward pass has ended."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

ALIGNED = 64  # elements: optimisers read 16 bytes at a time from where a piece begins


class Averaging:
    """Averages the gradients of weights of one type. The same weights have gradients in every step, on every rank."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self.flat = torch.empty(0)
        self.pieces: list[torch.Tensor] = []

    def __call__(self) -> None:
        """Put the mean over ranks in every gradient's place, laid out as its weight is."""
        having = [parameter for parameter in self.parameters if parameter.grad is not None]
        if not self.pieces:
            self._lay(having)
        torch._foreach_copy_(self.pieces, [p.grad for p in having if p.grad is not None])
        self.flat.div_(dist.get_world_size())  # before they are summed, as DDP does: the sum can not overflow
        dist.all_reduce(self.flat)
        for parameter, piece in zip(having, self.pieces, strict=True):
            parameter.grad = piece

    def _lay(self, parameters: list[nn.Parameter]) -> None:
        """One tensor for all gradients, and the piece of each in it."""
        starts, end = [], 0
        for parameter in parameters:
            starts.append(end)
            end += -(-parameter.numel() // ALIGNED) * ALIGNED
        like = parameters[0]
        self.flat = torch.zeros(end, dtype=like.dtype, device=like.device)
        self.pieces = [self.flat.as_strided(parameter.shape, parameter.stride(), start)
                       for parameter, start in zip(parameters, starts, strict=True)]  # fmt: skip
