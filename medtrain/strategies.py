"""Which strategy a recipe gets."""

from collections.abc import Sequence

from torch import nn

from medtrain.distributed import Ranks
from medtrain.errors import UserError
from medtrain.graphs import refusal, replays
from medtrain.recipe import Recipe
from medtrain.strategy import Ddp, Group, Replicas, Single


def make_strategy(model: nn.Module, groups: Sequence[Group], recipe: Recipe, ranks: Ranks) -> Single:
    """`auto` is Ddp when there are several ranks, or Replicas where they replay their steps; raises UserError for a
    strategy that can not be.
    """
    check_settings(recipe, ranks.world)
    train = recipe.train
    if train.compile == "replay" and (reason := refusal(model, groups, recipe, ranks.device, ranks.world)):
        raise UserError(f"train.compile=replay can not be, as {reason}: --set train.compile=auto.")
    if train.strategy == "deepspeed":
        from medtrain.zero import DeepSpeed

        return DeepSpeed(model, groups, recipe, ranks)
    if ranks.world == 1:
        return Single(model, groups, recipe, ranks)
    kind = Replicas if replays(model, groups, recipe, ranks.device, ranks.world) else Ddp
    return kind(model, groups, recipe, ranks)


def check_settings(recipe: Recipe, world: int) -> None:
    """Raise UserError for settings that can not be on so many processes, whatever the device and the network."""
    train = recipe.train
    share = train.accumulate * world
    if train.batch % share:
        raise UserError(
            f"{recipe.name}: train.batch={train.batch} can not be shared by {world} processes x {train.accumulate} "
            f"accumulations: --set train.batch={max(1, round(train.batch / share)) * share}."
        )
    if train.compile == "graphs" and train.accumulate > 1:
        # a CUDA graph writes over the memory of the step before, in which the gradients are summed up
        raise UserError(
            f"train.compile=graphs can not accumulate {train.accumulate} micro-batches: --set train.compile=on."
        )
    if train.strategy == "single" and world > 1:
        raise UserError(f"train.strategy=single can not use {world} processes: take auto or ddp.")
    if train.strategy == "deepspeed":
        from medtrain import zero

        zero.check(recipe, train.precision)
        zero.configuration(recipe, world, "fp32" if train.precision == "auto" else train.precision)
