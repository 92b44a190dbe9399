"""Run under torchrun by test_graphs.py, with the name of a backend: losses of ranks that share one GPU, by DDP step by
step and replayed.

Prints one JSON line: losses (`ddp`, `replayed`), on how many ranks there was a graph (`graphs`), and how far weights
of two ranks are `apart`.
"""

import json
import sys

import torch
import torch.distributed as dist

from medseg.models import build_model
from medseg.recipes import RECIPES
from medtrain import distributed
from medtrain.distributed import Ranks
from medtrain.replayed import Replayed
from medtrain.strategies import make_strategy
from medtrain.strategy import Ddp, one_group

STEPS, SIDE = 8, 32


def main() -> None:
    """Both ways from the same weights, on the same batches."""
    dist.init_process_group(sys.argv[1])
    device = torch.device("cuda", 0)
    # one that shares the work even where it is alone, so that NCCL takes part
    ranks = Ranks(dist.get_rank(), max(2, dist.get_world_size()), 0, device)
    found = {}
    for way, kind in (("ddp", Ddp), ("replayed", Replayed)):
        recipe = RECIPES["brats_segresnet"]().override(
            [f"data.crop={SIDE},{SIDE},{SIDE}", "train.precision=bf16", "model.dropout=0",
             f"train.strategy={'ddp' if way == 'ddp' else 'auto'}"]
        )  # fmt: skip
        torch.manual_seed(ranks.rank if way == "replayed" else 0)  # replayed begin with the weights of rank 0
        model = build_model(recipe)
        strategy = make_strategy(model, one_group(model), recipe, ranks)
        assert isinstance(strategy, kind), type(strategy)
        strategy.train_mode()
        losses = []
        for step in range(STEPS):
            generator = torch.Generator(device).manual_seed(100 * step + ranks.rank)
            image = torch.randn(1, 4, SIDE, SIDE, SIDE, device=device, generator=generator)
            loss = (strategy.forward(image) - 0.3).square().mean()
            strategy.backward(loss)
            strategy.step(1e-3)
            losses.append(float(distributed.mean(loss.detach())))
            del loss  # what it holds would keep gradients' nodes of before
        found[way] = losses
    graphs = sum(distributed.gather(model.forward.graphed is not None))
    weights = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    first = weights.clone()
    dist.broadcast(first, src=0)
    apart = max(distributed.gather((weights - first).abs().max().item()))
    if ranks.is_main:
        print(json.dumps({**found, "graphs": graphs, "apart": apart}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
