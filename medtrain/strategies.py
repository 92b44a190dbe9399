"""Which strategy a recipe gets."""

from collections.abc import Sequence

from torch import nn

from medtrain.distributed import Ranks
from medtrain.graphs import refusal, replays
from medtrain.recipe import Recipe
from medtrain.replayed import Replayed
from medtrain.settings import check_settings, refuse_replay
from medtrain.strategy import Ddp, Group, Single


def make_strategy(model: nn.Module, groups: Sequence[Group], recipe: Recipe, ranks: Ranks) -> Single:
    """DeepSpeed where the recipe names it; else Replayed where steps run as CUDA graphs; else Ddp on several ranks,
    Single on one. Raises UserError for a strategy that can not be.
    """
    check_settings(recipe, ranks.world)
    train = recipe.train
    if train.compile == "replay":
        refuse_replay(refusal(model, recipe, ranks.device, ranks.world))
    if train.strategy == "deepspeed":
        from medtrain.zero import DeepSpeed

        return DeepSpeed(model, groups, recipe, ranks)
    if replays(model, recipe, ranks.device, ranks.world):
        return Replayed(model, groups, recipe, ranks)
    return (Ddp if ranks.world > 1 else Single)(model, groups, recipe, ranks)
