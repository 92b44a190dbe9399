"""Steps a second, floating-point rate and peak memory of SegResNet, UNETR, SwinUNETR and DynUNet, in several ways.

`python tests/bench/gpu_networks.py` on a GPU appends to results.csv; `--smoke` only proves, without one, that it runs.
"""

import time
from collections.abc import Sequence

import torch
from record import record
from rivals import synchronize

from medkernels.measurement import asked
from medlaunch.options import find_recipe
from medseg.task import example
from medtrain.estimate import Place, sizes_of, step_seconds

WAYS = {
    "MONAI's": ("model.kernels=reference",),
    "MONAI's, compiled, channels last": ("model.kernels=reference", "train.compile=on", "train.channels_last=true"),
    "eager": (),
    "compiled": ("train.compile=on",),
    "compiled, channels last": ("train.compile=on", "train.channels_last=true"),
    "CUDA graphs, channels last": ("train.compile=graphs", "train.channels_last=true"),
}
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
    """Measure all."""
    options = asked(__doc__ or "", arguments)
    device = torch.device(options.device)
    side, steps = (64, 1) if options.smoke else (128, 10)
    rate = matrix_rate(256 if options.smoke else 8192, device)
    card = "cpu" if options.smoke else torch.cuda.get_device_name()
    for name, batch in list(BATCHES.items())[: 1 if options.smoke else None]:
        for way, settings in WAYS.items():
            torch.compiler.reset()
            if options.smoke and settings:
                continue
            small = ["model.hidden=48", "model.mlp=64", "model.heads=4"] if options.smoke and "unetr" in name else []
            recipe = find_recipe(name).override(
                [f"data.crop={side},{side},{side}", "train.precision=bf16", f"train.batch={batch}", *settings,
                 *(small if name == "brats_unetr" else [])]
            )  # fmt: skip
            place = Place(device.type == "cuda", "bf16", device)
            flops = batch * sizes_of(lambda n, r=recipe: example(r, n, device), place).flops
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            spent = step_seconds(
                lambda n, r=recipe: example(r, n, device, r.model.kernels), recipe, batch, device, steps
            )
            peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
            record("gpu_networks", f"{name}, {way}", 1 / spent, "steps/s",
                   conditions=f"{card}, {side}^3, batch {batch}, bf16, {flops / spent / 1e12:.1f} TFLOP/s, "
                   f"{flops / spent / rate:.1%} of a matrix product's {rate / 1e12:.0f}, peak {peak:.1f} GB",
                   packages=("torch", "monai"), keep=options.record)  # fmt: skip


if __name__ == "__main__":
    main()
