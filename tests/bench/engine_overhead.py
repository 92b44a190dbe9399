"""The engine's step, loop and counters included, against a bare PyTorch loop on the same model and batch."""

import argparse
from typing import Any

import torch
from record import record
from rivals import Batch, compare

from medlaunch.tasks import find_recipe
from medtrain.distributed import Ranks
from medtrain.estimate import Example


def bare(recipe: Any, example: Example, batch: Batch) -> Any:
    """What a tutorial would write: autocast, loss, backward, a fused optimiser."""
    model = example.model.to(batch.inputs.device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-5, fused=True)
    device = batch.inputs.device.type

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            outputs = model(batch.inputs)
        example.loss(outputs.float(), batch.target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    """Measure, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    side, target = (128, 1.02) if gpu else (64, 1.03)
    recipe = find_recipe("brats_segresnet").override(
        [f"data.crop={side},{side},{side}", "train.precision=bf16", "train.batch=2", "model.kernels=reference",
         "train.compile=off"]
    )  # fmt: skip
    ranks = Ranks(0, 1, 0, torch.device("cuda" if gpu else "cpu"))
    ours, theirs = compare(recipe, ranks, bare, options.steps)
    card = torch.cuda.get_device_name() if gpu else ""
    record("engine_overhead", "SegResNet, a step of the engine", ours, "s", peer="bare PyTorch loop", peer_value=theirs,
           ratio=ours / theirs, target=f"<= {target}", conditions=f"{card} {side}^3, batch 2, bf16".strip(),
           packages=("torch", "monai"), keep=options.record)  # fmt: skip


if __name__ == "__main__":
    main()
