"""Two ranks: the engine's step against DDP, and against DeepSpeed, written by hand.

`python tests/bench/ddp_overhead.py` starts the ranks itself; on GPUs one a rank.
"""

import argparse
import os
import subprocess
import sys
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

RANKS, STEPS = 2, 16


def ddp(recipe: Any, example: Any, batch: Any) -> Any:
    """DistributedDataParallel by hand."""
    device = batch.inputs.device
    ids = [device.index] if device.type == "cuda" else None
    model = DistributedDataParallel(example.model.to(device).train(), device_ids=ids, gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            outputs = model(batch.inputs)
        example.loss(outputs.float(), batch.target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def deepspeed(recipe: Any, example: Any, batch: Any) -> Any:
    """DeepSpeed's own loop, ZeRO-2."""
    import deepspeed

    from medtrain.distributed import Ranks
    from medtrain.zero import _library, configuration

    _library(Ranks(int(os.environ["RANK"]), RANKS, int(os.environ["LOCAL_RANK"]), batch.inputs.device))
    model = example.model.to(batch.inputs.device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-5, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, dist_init_required=False,
                                      config=configuration(recipe, RANKS, "bf16"))  # fmt: skip

    def step() -> None:
        engine.backward(example.loss(engine(batch.inputs).float(), batch.target))
        engine.step()

    return step


RIVALS = {"ddp": ddp, "deepspeed": deepspeed}


def one_rank(strategy: str) -> None:
    """Measure; rank 0 prints."""
    from rivals import compare

    from medlaunch.tasks import find_recipe
    from medtrain import distributed

    ranks = distributed.start(300)
    side = 128 if ranks.device.type == "cuda" else 48
    recipe = find_recipe("brats_segresnet").override(
        [f"data.crop={side},{side},{side}", "train.precision=bf16", f"train.batch={RANKS}", "train.zero=2",
         f"train.strategy={strategy}", "model.kernels=reference"]
    )  # fmt: skip
    ours, theirs = compare(recipe, ranks, RIVALS[strategy], STEPS)
    if ranks.is_main:
        print(side, ours, theirs, flush=True)
    distributed.finish()


def main() -> None:
    """Start the ranks for each rival."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--rank-of", choices=RIVALS)
    options = parser.parse_args()
    if options.rank_of:
        one_rank(options.rank_of)
        return
    from record import record

    for strategy in RIVALS:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS),
                   __file__, "--rank-of", strategy]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        side, ours, theirs = map(float, done.stdout.split()[-3:])
        record("ddp_overhead", f"{strategy}, {RANKS} ranks, a step of the engine", ours, "s",
               peer=f"{strategy} by hand", peer_value=theirs, ratio=theirs / ours, target=">= 0.9",
               conditions=f"SegResNet {side:.0f}^3, batch 1 a rank, bf16, one thread a rank",
               packages=("torch", "monai", "deepspeed"), keep=options.record)  # fmt: skip


if __name__ == "__main__":
    main()
