"""Training speed of the four classifiers through cache, DALI and engine, against a bare loop on one resident batch.

`python tests/bench/gpu_images.py` on a GPU; `--device-check cpu --size 32 --batch 8 --steps 4` shows only that it runs.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from gpu_training import steps_per_second, through_engine
from record import record


def bare_loop(recipe: Any, steps: int, classes: int) -> float:
    """Images a second of forward, loss, backward and step on one random batch that stays on the device."""
    import torch
    from torch.nn import functional

    from medcls import backbones
    from medtrain.distributed import start
    from medtrain.strategy import Single

    ranks = start()
    model = backbones.build_model(recipe, classes)
    strategy = Single(model, backbones.parameter_groups(model, recipe), recipe, ranks)
    image = torch.randn(recipe.train.batch, 3, recipe.data.size, recipe.data.size, device=ranks.device)
    target = torch.randint(0, classes, (recipe.train.batch,), device=ranks.device)

    def step() -> None:
        with strategy.autocast():
            logits = strategy.model(image)
        strategy.backward(functional.cross_entropy(logits.float(), target))
        strategy.step(1e-4)

    return recipe.train.batch * steps_per_second(step, steps, ranks.device)


def main() -> None:
    """Measure and print one line of JSON a network."""
    import torch

    from medcls.phantom import write_dataset
    from medcls.preparation import prepare_folder
    from medcls.recipes import RECIPES, SWEEPS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device-check", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device_check == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no CUDA device here.")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        images = max(12, 2 * options.batch)
        write_dataset(place / "data", images=images, size=512 if options.size > 64 else 64, cancers=("Brain Cancer",),
                      copies=0, workers=2)  # fmt: skip
        cache = prepare_folder(place / "data", place / "c.h5", workers=2)
        for name in SWEEPS["multicancer"]:
            epochs = max(1, round(options.steps * options.batch / (2.1 * images)))
            recipe = RECIPES[name]().override(
                [f"data.size={options.size}", f"train.batch={options.batch}", f"train.epochs={epochs}",
                 "model.weights=none", f"train.workers={options.workers}", "train.validate_every=100000",
                 f"train.log_every={max(1, options.steps // 2)}", "data.cancer=Brain Cancer"]
            )  # fmt: skip
            ours = through_engine(recipe, cache, place / name)
            bare = bare_loop(recipe, options.steps, 3)
            speed = ours["speed/samples_per_s"]
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
            record("gpu_images", name, speed, "images/s", peer="bare loop on one resident batch", peer_value=bare,
                   ratio=speed / bare, target=">= 0.97", packages=("torch", "timm"),
                   conditions=f"{device}, {options.size} pixels, batch {options.batch}, waits for data "
                   f"{ours['speed/data_wait_share']:.1%}, peak {ours['memory/peak_gb']:.1f} GB",
                   keep=options.device_check == "cuda")  # fmt: skip


if __name__ == "__main__":
    main()
