"""Steps replayed as CUDA graphs: gradients leave the graphs' memory, are summed over micro-batches, and averaged over
ranks in one piece.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from medtrain.distributed import Ranks, gather
from medtrain.errors import Failed
from medtrain.graphs import Replay
from medtrain.recipe import Recipe
from medtrain.strategy import Group, Single, broadcast_tensors

REMEDY = "--set train.compile=off."
ALIGNED = 64  # elements: optimisers read 16 bytes at a time from where a piece begins


class Gradients:
    """The gradients of weights of one type in one tensor. The same weights have some in every pass, on every rank."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self.having: list[int] = []  # which of them get gradients
        self.flat = torch.empty(0)
        self.pieces: list[torch.Tensor] = []
        self.passes = 0

    def take(self) -> None:
        """Add a backward pass's gradients, and clear them. Raises Failed where not the same weights have gradients."""
        having = [n for n, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if not self.pieces:
            self._lay(having)
        if having != self.having:
            raise Failed(f"other weights got gradients than in the first step: {REMEDY}")
        found = [grad for n in having if (grad := self.parameters[n].grad) is not None]
        (torch._foreach_add_ if self.passes else torch._foreach_copy_)(self.pieces, found)
        self.passes += 1
        for n in having:
            self.parameters[n].grad = None

    def give(self, world: int) -> None:
        """Put the sums, averaged over ranks, in the gradients' places, laid out as the weights are."""
        if world > 1:
            self.flat.div_(dist.get_world_size())  # before they are summed, as DDP does: the sum can not overflow
            dist.all_reduce(self.flat)
        for n, piece in zip(self.having, self.pieces, strict=True):
            self.parameters[n].grad = piece
        self.passes = 0

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


class Replayed(Single):
    """One process, or several with equal weights, whose forward and backward passes are replayed. DDP would average
    gradients meanwhile, by nodes of its graph that a capture makes anew.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], recipe: Recipe, ranks: Ranks):
        super().__init__(model, groups, recipe, ranks)
        self.world = ranks.world
        self.gradients = Gradients(self.model.parameters())
        if self.world > 1:
            broadcast_tensors([*self.model.parameters(), *self.model.buffers()])
        self.replay = Replay(self.model) if self.device.type == "cuda" else None  # CPUs have no graphs

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        self.gradients.take()

    def step(self, lr: float) -> torch.Tensor:
        self.gradients.give(self.world)
        return super().step(lr)
