"""Which strategy a recipe gets."""

from collections.abc import Sequence

from torch import nn

from medtrain.distributed import Ranks
from medtrain.errors import UserError
from medtrain.graphs import refusal
from medtrain.recipe import Recipe
from medtrain.strategy import Ddp, Group, Single


def make_strategy(model: nn.Module, groups: Sequence[Group], recipe: Recipe, ranks: Ranks) -> Single:
    """`auto` is Ddp when there are several ranks; raises UserError for a strategy that can not be."""
    wanted, train = recipe.train.strategy, recipe.train
    if train.compile == "graphs" and train.accumulate > 1:
        # a CUDA graph writes over the memory of the step before, in which the gradients are summed up
        raise UserError(
            f"train.compile=graphs can not accumulate {train.accumulate} micro-batches: --set train.compile=on."
        )
    if train.compile == "replay" and (reason := refusal(model, groups, recipe, ranks.device, ranks.world)):
        raise UserError(f"train.compile=replay can not be, as {reason}: --set train.compile=auto.")
    if wanted == "single" and ranks.world > 1:
        raise UserError(f"train.strategy=single can not use {ranks.world} processes: take auto or ddp.")
    if wanted == "deepspeed":
        from medtrain.zero import DeepSpeed  # seconds to import

        return DeepSpeed(model, groups, recipe, ranks)
    return (Ddp if ranks.world > 1 else Single)(model, groups, recipe, ranks)
