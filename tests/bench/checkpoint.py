"""How long saving holds training up: the copy that a step waits for, the whole write, and the steps beside it."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import record

from medseg.models import build_model
from medseg.recipes import RECIPES
from medtrain import checkpoint
from medtrain.distributed import Ranks
from medtrain.strategy import Single, one_group
from medtrain.writer import Writer

NETWORKS = ("brats_segresnet", "brats_unetr")


def seconds(function: Any) -> float:
    """How long a call takes."""
    before = time.perf_counter()
    function()
    return time.perf_counter() - before


def main() -> None:
    """Measure both networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--side", type=int, default=128, help="of the crop, in voxels (default: the recipes' own)")
    parser.add_argument("--steps", type=int, default=5, help="steps with and without a write beside them")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in NETWORKS:
        measure(name, options.side, device, options.steps, keep=options.record)


def measure(name: str, side: int, device: torch.device, steps: int, *, keep: bool) -> None:
    """One network's rows."""
    recipe = RECIPES[name]().override([f"data.crop={side},{side},{side}"])
    model = build_model(recipe)
    strategy = Single(model, one_group(model), recipe, Ranks(0, 1, 0, device))
    image = torch.randn(recipe.train.batch, 4, side, side, side, device=device)

    def step() -> None:
        with strategy.autocast():
            loss = strategy.wrapped(image).float().square().mean()
        strategy.backward(loss)
        strategy.step(1e-4)
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    with tempfile.TemporaryDirectory() as folder:
        path, writer = Path(folder) / "c.pt", Writer()
        whole = statistics.median(seconds(lambda: checkpoint.save(path, strategy.state())) for _ in range(3))
        times, held, beside = [], [], []
        for _ in range(steps):
            times.append(seconds(step))
            held.append(seconds(lambda: writer.write(path, strategy.state())))
            beside.append(seconds(step))
            writer.wait()
        alone = statistics.median(times)
        size = path.stat().st_size / 1e6
    conditions = f"{side}^3, batch {recipe.train.batch}, {strategy.precision}, checkpoint {size:.0f} MB"
    per_interval = 100 * (statistics.median(held) + statistics.median(beside) - alone) / recipe.train.save_every_s
    held_share = 100 * statistics.median(held) / alone
    record("checkpoint", f"{name} at {side}^3, wait of a step that saves", statistics.median(held), "s",
           peer="writing it whole", peer_value=whole, ratio=whole / statistics.median(held), conditions=conditions,
           packages=("torch",), keep=keep)  # fmt: skip
    record("checkpoint", f"{name} at {side}^3, that wait against its step", held_share, "% of a step", target="<= 5",
           conditions=conditions, packages=("torch",), keep=keep)  # fmt: skip
    record("checkpoint", f"{name} at {side}^3, step while a checkpoint is written", statistics.median(beside), "s",
           peer="step alone", peer_value=alone, ratio=statistics.median(beside) / alone, conditions=conditions,
           packages=("torch",), keep=keep)  # fmt: skip
    record("checkpoint", f"{name} at {side}^3, all of it at the default interval", per_interval, "% of the time",
           target="<= 5", conditions=conditions, packages=("torch",), keep=keep)  # fmt: skip


if __name__ == "__main__":
    main()
