"""Steps a second, floating-point rate and peak memory of SegResNet, UNETR, SwinUNETR and DynUNet, in several ways.

`python tests/bench/gpu_networks.py [NETWORK...]` on a GPU appends to results.csv; `--smoke` only proves, without one,
that it runs.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from record import record
from rivals import fresh_peak, synchronize

from medkernels.measurement import asked
from medlaunch.tasks import find_recipe
from medseg.task import example
from medtrain.estimate import Place, sizes_of, step_seconds
from medtrain.graphs import Replay

WAYS = {
    "MONAI's": ("model.kernels=reference", "train.compile=off"),
    "kernels": (),
    "kernels, replayed": ("train.compile=replay",),
    "kernels, not replayed": ("train.compile=off",),
    "MONAI's, CUDA graphs, channels last": (
        "model.kernels=reference", "train.compile=graphs", "train.channels_last=on",
    ),
    "kernels, CUDA graphs": ("train.compile=graphs",),
}  # fmt: skip
COMPILED = [way for way, settings in WAYS.items() if "train.compile=graphs" in settings]
BATCHES = {"brats_segresnet": 2, "brats_unetr": 2, "brats_dynunet": 2, "brats_swinunetr": 1}


def matrix_rate(side: int, device: torch.device) -> float:
    """Operations a second of a product of bf16 matrices: what the card reaches, rather than what its sheet says."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all, or the networks that are named."""
    options = asked(__doc__ or "", arguments, names=tuple(BATCHES))
    device = torch.device(options.device)
    rate = matrix_rate(256 if options.smoke else 8192, device)
    for name in options.names or list(BATCHES)[: 1 if options.smoke else None]:
        flops = 0.0
        for way, settings in WAYS.items():
            if (options.smoke and settings) or (options.warm and way not in COMPILED):
                continue
            torch.compiler.reset()
            batch, side = BATCHES[name], 32 if options.smoke else 128
            precision = "fp32" if options.smoke else "bf16"  # which CPUs without AVX-512 imitate slowly
            recipe = find_recipe(name).override(
                [f"data.crop={side},{side},{side}", f"train.precision={precision}", f"train.batch={batch}", *settings]
            )
            place = Place(device.type == "cuda", precision, device)
            # MONAI's operations are counted, whatever the way
            flops = flops or batch * sizes_of(lambda n, r=recipe: example(r, n, device), place).flops
            try:
                measure(f"{name}, {way}", recipe, flops, rate, options)
            except Exception as error:  # compilers fail in many ways; the other ways are measured all the same
                if options.smoke:
                    raise
                print(f"{name}, {way}: FAILS: {type(error).__name__}: {error}", flush=True)


def measure(what: str, recipe: Any, flops: float, rate: float, options: argparse.Namespace) -> None:
    """Time a step of one network in one way, and record it."""
    device, batch = torch.device(options.device), recipe.train.batch
    fresh_peak()
    made: list[Any] = []

    def make(batch: int) -> Any:
        made[:] = [make_example(recipe, device, batch)]
        return made[0]

    spent = step_seconds(make, recipe, batch, device, 1 if options.smoke or options.warm else 10)
    replay = made.pop().model.forward  # the network's own, or what has taken its place
    if recipe.train.compile == "replay" and not (isinstance(replay, Replay) and replay.graphed):
        raise RuntimeError("the steps were not replayed")
    if options.warm:
        return
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    card = "cpu" if options.smoke else torch.cuda.get_device_name()
    record("gpu_networks", what, 1 / spent, "steps/s",
           conditions=f"{card}, {recipe.data.crop[0]}^3, batch {batch}, {recipe.train.precision}, "
           f"{batch / spent:.1f} patches/s, {flops / spent / 1e12:.1f} TFLOP/s, {flops / spent / rate:.1%} of a "
           f"matrix product's {rate / 1e12:.0f}, peak {peak:.1f} GB",
           packages=("torch", "monai"), keep=options.record)  # fmt: skip


def make_example(recipe: Any, device: torch.device, batch: int) -> Any:
    """The network with the recipe's kernels, and a batch of noise: zeros would be computed faster."""
    made = example(recipe, batch, device, recipe.model.kernels)
    made.inputs.normal_()
    made.target.random_(0, 4)
    return made


if __name__ == "__main__":
    main()
