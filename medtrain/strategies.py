"""Which strategy a recipe gets."""

from collections.abc import Sequence

from torch import nn

from medtrain.distributed import Ranks
from medtrain.graphs import refusal, replays
from medtrain.recipe import Recipe
from medtrain.replicas import Replicas
from medtrain.settings import check_settings, refuse_replay
from medtrain.strategy import Ddp, Group, Single


def make_strategy(model: nn.Module, groups: Sequence[Group], recipe: Recipe, ranks: Ranks) -> Single:
    """`auto` is Ddp when there are several ranks, or Replicas where they replay their steps; raises UserError for a
    strategy that can not be.
    """
    check_settings(recipe, ranks.world)
    train = recipe.train
    if train.compile == "replay":
        refuse_replay(refusal(model, recipe, ranks.device, ranks.world))
    if train.strategy == "deepspeed":
        from medtrain.zero import DeepSpeed

        return DeepSpeed(model, groups, recipe, ranks)
    if ranks.world == 1:
        return Single(model, groups, recipe, ranks)
    kind = Replicas if replays(model, recipe, ranks.device, ranks.world) else Ddp
    return kind(model, groups, recipe, ranks)
