"""Several processes that replay their steps: gradients are averaged in one piece once the backward pass has ended."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from medtrain.distributed import Ranks, gather
from medtrain.errors import Failed
from medtrain.recipe import Recipe
from medtrain.strategy import Group, Single, as_rank_0

REMEDY = "--set train.compile=off, which leaves them to DDP."
ALIGNED = 64  # elements: optimisers read 16 bytes at a time from where a piece begins


class Averaging:
    """Averages the gradients of weights of one type. The same weights have gradients in every step, on every rank."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self.having: list[int] = []  # which of them have gradients
        self.flat = torch.empty(0)
        self.pieces: list[torch.Tensor] = []

    def __call__(self) -> None:
        """Put the mean over ranks in every gradient's place, laid out as its weight is. Raises Failed where not the
        same weights have gradients.
        """
        having = [n for n, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if not self.pieces:
            self._lay(having)
        if having != self.having:
            raise Failed(f"other weights got gradients than in the first step: {REMEDY}")
        parameters = [self.parameters[n] for n in having]
        torch._foreach_copy_(self.pieces, [p.grad for p in parameters if p.grad is not None])
        self.flat.div_(dist.get_world_size())  # before they are summed, as DDP does: the sum can not overflow
        dist.all_reduce(self.flat)
        for parameter, piece in zip(parameters, self.pieces, strict=True):
            parameter.grad = piece

    def _lay(self, having: list[int]) -> None:
        """One tensor for all gradients, and the piece of each in it."""
        if not having or any(other != having for other in gather(having)):
            raise Failed(f"no weights got gradients, or others on another rank: {REMEDY}")
        self.having, starts, end = having, [], 0
        parameters = [self.parameters[n] for n in having]
        for parameter in parameters:
            starts.append(end)
            end += -(-parameter.numel() // ALIGNED) * ALIGNED
        like = parameters[0]
        self.flat = torch.zeros(end, dtype=like.dtype, device=like.device)
        self.pieces = [self.flat.as_strided(parameter.shape, parameter.stride(), start)
                       for parameter, start in zip(parameters, starts, strict=True)]  # fmt: skip


class Replicas(Single):
    """Several processes with equal weights whose steps are replayed; gradients are averaged in one piece afterwards.
    DDP would average them during the backward pass, by nodes of its graph that a capture replaces.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], recipe: Recipe, ranks: Ranks):
        super().__init__(model, groups, recipe, ranks)
        self.average = Averaging(self.model.parameters())
        as_rank_0([*self.model.parameters(), *self.model.buffers()])

    def step(self, lr: float) -> torch.Tensor:
        self.average()
        return super().step(lr)

    def sync_buffers(self) -> None:
        as_rank_0(self.model.buffers())
