"""Run under torchrun by test_zero.py: every strategy's losses on the same global batch, and what its state goes on to.

Prints one JSON line a combination: losses of one process, of this strategy, after loading its state again, and of one
process that goes on from it.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from medcls.backbones import build_model as build_classifier
from medcls.recipes import RECIPES as CLS_RECIPES
from medseg.models import build_model as build_segmenter
from medseg.recipes import RECIPES as SEG_RECIPES
from medtrain import distributed
from medtrain.distributed import Ranks
from medtrain.replayed import Replayed
from medtrain.strategies import make_strategy
from medtrain.strategy import Single, one_group
from medtrain.writer import on_host

STEPS = 2
Mean = Callable[[torch.Tensor], torch.Tensor]


def own(loss: torch.Tensor) -> torch.Tensor:
    """The loss of one process that has the whole batch."""
    return loss


def networks(precision: str) -> Iterator[tuple[str, Any, Any, torch.Tensor]]:
    """Name, recipe, how to build it, and the input of the first rank; fewer and smaller in bf16, which CPUs without
    AVX-512 imitate slowly.

    The classifiers' batch normalisation sees the samples of its own rank: there all ranks get the same ones, so that
    their statistics are those of the whole batch.
    """
    generator = torch.Generator().manual_seed(0)
    unetr = ["model.feature=4", "model.hidden=48", "model.mlp=64", "model.heads=4"]
    for name, side, small in (("segresnet", 32 if precision == "fp32" else 16, []), ("unetr", 32, unetr)):
        crop = f"data.crop={side},{side},{side}"
        recipe = SEG_RECIPES[f"brats_{name}_demo"]().override([crop, "model.dropout=0", *small])
        yield name, recipe, build_segmenter, torch.randn(1, 4, side, side, side, generator=generator)
    for name in ("mobilenetv3",) if precision == "fp32" else ():
        recipe = CLS_RECIPES[f"multicancer_{name}_demo"]()
        yield name, recipe, lambda r: build_classifier(r, 3), torch.randn(2, 3, 64, 64, generator=generator)


def inputs(first: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    """What a rank gets at a step."""
    shifted = first + 0.1 * step
    return shifted if first.ndim == 4 else shifted * (1 + 0.5 * rank)


def run(strategy: Single, batches: list[torch.Tensor], lr: float, mean: Mean = distributed.mean) -> list[float]:
    """Losses, a step each; their mean over ranks, or another one where no rank shares the work."""
    strategy.train_mode()
    losses = []
    for batch in batches:
        loss = (strategy.forward(batch).float() - 0.3).square().mean()
        strategy.backward(loss)
        strategy.step(lr)
        losses.append(float(mean(loss.detach())))
    return losses


def alone(recipe: Any, build: Any) -> Single:
    """One process's strategy with the same fresh weights."""
    torch.manual_seed(1)
    model = build(recipe)
    return Single(model, one_group(model), recipe, Ranks(0, 1, 0, torch.device("cpu")))


def main() -> None:
    """Every network with each of the settings of the command line, such as `deepspeed:2:bf16`."""
    ranks = distributed.start(120)
    torch.set_num_threads(1)
    references: dict[tuple[str, str], list[float]] = {}
    combinations = [(settings, *network) for settings in sys.argv[1:] for network in networks(settings.split(":")[2])]
    for settings, name, plain, build, first in combinations:
        kind, stage, precision = settings.split(":")
        recipe = plain.override([
            f"train.strategy={'auto' if kind == 'replayed' else kind}",
            *([f"train.zero={stage}"] if kind == "deepspeed" else []),
            f"train.precision={precision}", "optim.ema=0",
            f"train.batch={2 * len(first)}", "train.accumulate=1", "optim.clip_norm=1",
            # Adam's first steps are signs of gradients: with batch normalisation rounding soon tells
            f"optim.name={'adamw' if first.ndim == 5 else 'sgd'}",
        ])  # fmt: skip
        lr = 1e-4
        mine = [inputs(first, ranks.rank, step) for step in range(2 * STEPS)]
        whole = [torch.cat([inputs(first, rank, step) for rank in range(2)]) for step in range(2 * STEPS)]
        if (name, precision) not in references:
            references[name, precision] = run(alone(recipe, build), whole, lr, own)
        losses = {"single": references[name, precision]}
        torch.manual_seed(1)
        model = build(recipe)
        make = Replayed if kind == "replayed" else make_strategy  # chosen on a GPU only
        strategy = make(model, one_group(model), recipe, ranks)
        before = run(strategy, mine[:STEPS], lr)
        state = on_host(strategy.state())
        losses["ranks"] = before + run(strategy, mine[STEPS:], lr)
        torch.manual_seed(2)
        model = build(recipe)
        other = make(model, one_group(model), recipe, ranks)
        other.load(copy.deepcopy(state))
        losses["again"] = before + run(other, mine[STEPS:], lr)
        moved = alone(recipe, build)
        moved.load(copy.deepcopy(state))
        losses["moved"] = before + run(moved, whole[STEPS:], lr, own)
        plainly: nn.Module = build(recipe)
        plainly.load_state_dict(state["model"], strict=True)
        if ranks.is_main:
            print(json.dumps({"settings": settings, "network": name, **losses}), flush=True)
        distributed.barrier()
    distributed.finish()


if __name__ == "__main__":
    main()
