"""The peer of `brats_segresnet_2mm`: a plain MONAI training script on the same cache.

`python tests/bench/peer_monai_2mm.py --cache C.h5 --holdout A,B [--steps 1090]` prints Dice on the original grid.
SegResNet of 16 filters, 64^3 crops (half of them centred on tumour), batch 2, flips, intensity shift and scale, soft
Dice, Adam 1e-3 with poly decay, bf16; sliding window with overlap 0.5, averaged over flips as the recipe is.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def batches(task: Any) -> Iterator[Any]:
    """Endless batches of 2 from MONAI's transforms on arrays in memory."""
    from monai import transforms as mt
    from monai.data import DataLoader, Dataset

    cases = [
        {"image": task.cache.read(c, "image").astype(np.float32), "label": task.cache.read(c, "label")[None]}
        for c in task.split.train
    ]
    keys = ["image", "label"]
    augment = mt.Compose(
        [
            mt.RandCropByPosNegLabeld(keys, "label", task.recipe.data.crop, pos=1, neg=1, num_samples=1),
            *[mt.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)],
            mt.RandScaleIntensityd("image", 0.1, prob=1.0, channel_wise=True),
            mt.RandShiftIntensityd("image", 0.1, prob=1.0, channel_wise=True),
        ]
    )
    while True:
        yield from DataLoader(Dataset(cases * 200, augment), batch_size=2, shuffle=True, num_workers=1, drop_last=True)


def train(task: Any, steps: int) -> Any:
    """The trained network."""
    import torch
    from monai.losses import DiceLoss
    from monai.networks.nets import SegResNet

    from medseg.losses import region_targets

    net = SegResNet(init_filters=16, in_channels=4, out_channels=3, dropout_prob=0.2)
    loss_of = DiceLoss(sigmoid=True, squared_pred=True, smooth_nr=0, smooth_dr=1e-5)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, 0.9)
    began = time.monotonic()
    for step, batch in zip(range(steps), batches(task), strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(batch["image"].as_tensor())
        loss = loss_of(logits.float(), region_targets(batch["label"].as_tensor()[:, 0], task.label_map))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            spent = time.monotonic() - began
            print(f"step {step} of {steps}, loss {loss.item():.3f}, {spent:.0f} s", flush=True)
    return net.eval()


def main() -> None:
    """Train and score."""
    import torch
    from monai.utils import set_determinism

    from medseg import infer, metrics
    from medseg.cache import Cache
    from medseg.recipes import RECIPES
    from medseg.task import SegTask

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--holdout", required=True)
    parser.add_argument("--steps", type=int, default=1090)
    options = parser.parse_args()
    set_determinism(0)
    recipe = RECIPES["brats_segresnet_2mm"]().override([f"data.holdout={options.holdout}"])
    task = SegTask(recipe, Cache(options.cache))
    net = train(task, options.steps)

    def forward(image: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return net(image).float()

    for case in task.split.val:
        coarse = infer.region_probs(forward, task.cache.read(case, "image"), recipe, flips=recipe.evaluate.flips)
        label = task.label_map.label(infer.to_native(coarse, task.grid(case).native))
        scores = metrics.score_case(label, task.reference(case), task.label_map)
        print(json.dumps({"case": case, **{name: round(value, 4) for name, value in scores.items()}}))


if __name__ == "__main__":
    main()
