"""Training speed of `brats_segresnet` through cache, DALI and engine, against a bare loop on one resident batch.

`python tests/bench/gpu_training.py` on a GPU; `--device-check cpu --crop 32 --steps 4` only proves that it runs.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import record
from rivals import fresh_peak, synchronize


def through_engine(recipe: Any, cache: Path, out: Path) -> dict[str, float]:
    """Samples a second, share of time waiting for data and peak memory of the last interval, half of the steps."""
    from medlaunch.run import run

    fresh_peak()
    run(recipe, cache, out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "train/loss" in line][-1]


def bare_loop(recipe: Any, steps: int) -> float:
    """Samples a second of forward, loss, backward and step on one random batch that stays on the device."""
    import torch

    from medseg.labels import KNOWN
    from medseg.losses import region_loss
    from medseg.models import build_model
    from medtrain.distributed import start
    from medtrain.strategies import make_strategy
    from medtrain.strategy import one_group

    ranks = start()
    model = build_model(recipe)
    strategy = make_strategy(model, one_group(model), recipe, ranks)
    image = torch.randn(recipe.train.batch, 4, *recipe.data.crop, device=ranks.device)
    label = torch.randint(0, 4, (recipe.train.batch, *recipe.data.crop), device=ranks.device).to(torch.uint8)

    def step() -> None:
        strategy.backward(region_loss(strategy.forward(image), label, KNOWN["msd"], recipe.loss))
        strategy.step(1e-4)

    return recipe.train.batch * steps_per_second(step, steps, ranks.device)


def steps_per_second(step: Callable[[], None], steps: int, device: Any) -> float:
    """The rate of a step, after three."""
    for _ in range(3):
        step()
    synchronize(device)
    began = time.monotonic()
    for _ in range(steps):
        step()
    synchronize(device)
    return steps / (time.monotonic() - began)


def compare(where: str, recipe: Any, ours: dict[str, float], bare: float, keep: bool) -> None:
    """Print one loader's rate beside the bare loop's, and record it if asked."""
    import torch

    speed, cores = ours["speed/samples_per_s"], len(os.sched_getaffinity(0))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    record("gpu_training", f"{recipe.name}, {where}, {cores} cores", speed, "samples/s",
           peer="bare loop on one resident batch", peer_value=bare, ratio=speed / bare, target=">= 0.97",
           conditions=f"{device}, {recipe.data.crop[0]}^3, batch {recipe.train.batch}, waits for data "
           f"{ours['speed/data_wait_share']:.1%}, peak {ours['memory/peak_gb']:.1f} GB",
           packages=("torch", "monai"), keep=keep)  # fmt: skip


def main() -> None:
    """Measure and print one line of JSON for each loader."""
    import torch

    from medseg.phantom import write_dataset
    from medseg.preparation import Preparation, prepare_dataset
    from medseg.recipes import RECIPES
    from medtrain.errors import UserError

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--cache", type=Path, help="of volumes, instead of phantoms made for this")
    parser.add_argument("--device-check", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    options.keep = options.device_check == "cuda"
    if options.device_check == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no CUDA device here.")
    shape, spacing_mm = ((160, 192, 144), 1.2) if options.crop > 64 else ((64, 72, 56), 3.0)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        cache = options.cache
        if cache is None:
            write_dataset(place / "data", cases=5, shape=shape, spacing_mm=spacing_mm)
            cache = prepare_dataset(place / "data", place / "c.h5", Preparation(), workers=2)
        side = options.crop
        epochs = max(1, options.steps * 2 // 40)
        recipe = RECIPES["brats_segresnet"]().override(
            [f"data.crop={side},{side},{side}", "data.crops_per_case=10", f"train.epochs={epochs}",
             f"train.workers={options.workers}", "train.validate_every=100000",
             f"train.log_every={max(1, options.steps // 2)}"]
        )  # fmt: skip
        bare = bare_loop(recipe, options.steps)
        for where, on in {"resident volumes": "on", "DALI": "off"}.items():
            try:
                ours = through_engine(recipe.override([f"data.resident={on}"]), cache, place / where)
            except UserError as error:  # DALI may not be installed: the other loader is measured all the same
                print(f"{where}: FAILS: {error}", flush=True)
                continue
            compare(where, recipe, ours, bare, options.keep)


if __name__ == "__main__":
    main()
