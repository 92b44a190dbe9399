"""The memory that `launch/train.py --plan` tells against the peak of a real step, each in a fresh process.

On a CPU it is of the whole process; on a GPU of tensors.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

CASES = {
    "brats_segresnet": "data.crop=96,96,96",
    "brats_unetr": "data.crop=96,96,96",
    "brats_dynunet": "data.crop=96,96,96",
    "brats_swinunetr": "data.crop=96,96,96",
    "multicancer_densenet201": "train.batch=16",
    "multicancer_resnetv2": "train.batch=16",
    "multicancer_vgg19": "train.batch=16",
}


def recipe_of(name: str, settings: list[str]) -> Any:
    """The recipe, with weights that need no file."""
    from medlaunch.tasks import find_recipe

    more = ["model.weights=none"] if name.startswith("multicancer") else []
    return find_recipe(name).override([*settings, *more])


def predicted(recipe: Any) -> float:
    """GB as the plan tells them."""
    import torch

    from medlaunch.tasks import DOORS
    from medtrain.estimate import Place, memory_of_rank, process_bytes, sizes_of
    from medtrain.precision import precision_for

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = Place(device.type == "cuda", precision_for(recipe, device), device)
    sizes = sizes_of(lambda batch: DOORS[recipe.task].example(recipe, batch, device), place)
    process = 0.0 if place.gpu else process_bytes(place)
    return memory_of_rank(sizes, recipe, 1, recipe.train.batch)["together"] / 1e9 + process / 1e9


def measured(recipe: Any) -> float:
    """GB at the peak of some real optimiser steps in this process."""
    import torch

    from medlaunch.tasks import DOORS
    from medtrain.estimate import step_seconds
    from medtrain.meter import peak_gb

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step_seconds(lambda batch: DOORS[recipe.task].example(recipe, batch, device), recipe, recipe.train.batch, device, 2)
    return peak_gb(device)


def main() -> None:
    """All cases, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--one", nargs="+", help="a recipe and its settings, measured in this process")
    options = parser.parse_args()
    if options.one:
        recipe = recipe_of(options.one[0], options.one[1:])
        told = predicted(recipe)
        print(told, measured(recipe))
        return
    import torch
    from record import record

    gpu = torch.cuda.is_available()

    def ask(case: tuple[str, str]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, __file__, "--one", *case]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)

    # peaks are each process's own; on a CPU they would share its cores
    with ThreadPoolExecutor(4 if gpu else 1) as pool:
        answers = list(zip(CASES.items(), pool.map(ask, CASES.items()), strict=True))
    for (name, setting), done in answers:
        if done.returncode:
            print(f"{name}, {setting}: FAILS", flush=True)
            continue
        told, real = map(float, done.stdout.split()[-2:])
        record("memory_plan", f"{name}, {setting}", told, "GB", peer="real steps", peer_value=real, ratio=told / real,
               target="0.8 to 1.2", conditions=torch.cuda.get_device_name() if gpu else "",
               packages=("torch", "monai", "timm"), keep=options.record)  # fmt: skip


if __name__ == "__main__":
    main()
