"""Two members over one scan of 240x240x155 in 128^3 windows: ours in one pass, MONAI's SlidingWindowInferer in two.

`python tests/bench/gpu_inference.py` on a GPU appends to results.csv; `--smoke` only proves, without one, that it runs.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from record import record

from medkernels.measurement import asked
from medseg.infer import blended_on_device
from medseg.models import build_model
from medseg.recipes import RECIPES, window_of
from medtrain.strategy import inference


def median_seconds(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Of some calls after a first one."""
    found = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both and compare their probabilities."""
    options = asked(__doc__ or "", arguments)
    device = torch.device(options.device)
    side, shape, times = (32, (40, 40, 40), 1) if options.smoke else (128, (240, 240, 155), 3)
    small = ["model.hidden=48", "model.mlp=64", "model.heads=4"] if options.smoke else []
    # CPUs without AVX-512 imitate bf16, a hundred times as slowly
    kernels, precision = ("reference", "fp32") if options.smoke else ("auto", "bf16")
    recipes = [
        RECIPES[name]().override([f"data.crop={side},{side},{side}", f"train.precision={precision}",
                                  "evaluate.overlap=0.5", f"model.kernels={kernels}", *more])
        for name, more in (("brats_segresnet", []), ("brats_unetr", small))
    ]  # fmt: skip
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((4, *shape)).astype(np.float16)).to(device)
    torch.manual_seed(0)
    ours = [inference(build_model(recipe), recipe, device) for recipe in recipes]
    torch.manual_seed(0)
    plain = [recipe.override(["model.kernels=reference", "train.compile=off"]) for recipe in recipes]
    theirs = [inference(build_model(recipe), recipe, device) for recipe in plain]
    batch = recipes[0].evaluate.batch
    inferer = SlidingWindowInferer(window_of(recipes[0]), batch, overlap=0.5, mode="gaussian")

    def together() -> torch.Tensor:
        with torch.inference_mode():
            return torch.sigmoid(blended_on_device(ours, image, recipes[0])).mean(0)

    def one_by_one(nets: Sequence[torch.nn.Module] = theirs) -> torch.Tensor:
        with torch.inference_mode():
            return torch.stack([torch.sigmoid(inferer(image[None].float(), net)[0]) for net in nets]).mean(0)

    answer = together()
    gaps = {"the same networks": (ours, "<= 1e-3"), "MONAI's norms": (theirs, "")}
    fast, slow = (median_seconds(work, device, times) for work in (together, one_by_one))
    card = "cpu" if options.smoke else torch.cuda.get_device_name()
    conditions = f"{card}, {'x'.join(map(str, shape))}, windows {side}^3, overlap 0.5, batch {batch}, {precision}"
    record("gpu_inference", "SegResNet and UNETR, one scan", fast, "s", peer="MONAI SlidingWindowInferer, twice",
           peer_value=slow, ratio=slow / fast, target=">= 2", conditions=conditions, packages=("torch", "monai"),
           keep=options.record)  # fmt: skip
    for what, (nets, target) in gaps.items():
        gap = float((answer - one_by_one(nets)).abs().max())
        record("gpu_inference", f"probabilities against MONAI's inferer, {what}", gap, "",
               target=target, conditions=conditions, packages=("torch", "monai"), keep=options.record)  # fmt: skip


if __name__ == "__main__":
    main()
