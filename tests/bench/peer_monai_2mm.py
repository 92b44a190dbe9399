"""The peer of `brats_segresnet_2mm`: a plain MONAI training script on the same cache, crops and minutes.

`python tests/bench/peer_monai_2mm.py --cache C.h5 --holdout A,B [--steps 1136]` prints Dice on the original grid.
SegResNet of 16 filters, 64^3 crops (half of them centred on tumour), batch 2, flips, intensity shift and scale, soft
Dice, Adam 1e-3 with poly decay, bf16; sliding window with overlap 0.5, no flips at the end.
"""

import argparse
import json
import time
from pathlib import Path


def main() -> None:
    """Train and score."""
    import numpy as np
    import torch
    from monai import transforms as mt
    from monai.data import CacheDataset, DataLoader
    from monai.losses import DiceLoss
    from monai.networks.nets import SegResNet
    from monai.utils import set_determinism

    from medseg import infer, metrics
    from medseg.losses import region_targets
    from medseg.recipes import RECIPES
    from medseg.task import SegTask
    from medtrain.cache import Cache

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--holdout", required=True)
    parser.add_argument("--steps", type=int, default=1136)
    options = parser.parse_args()
    set_determinism(0)
    recipe = RECIPES["brats_segresnet_2mm"]().override([f"data.holdout={options.holdout}"])
    task = SegTask(recipe, Cache(options.cache))
    cases = [
        {"image": task.cache.read(c, "image").astype(np.float32), "label": task.cache.read(c, "label")[None]}
        for c in task.split.train
    ]
    keys, crop = ["image", "label"], recipe.data.crop
    augment = mt.Compose(
        [
            mt.RandCropByPosNegLabeld(keys, "label", crop, pos=1, neg=1, num_samples=1),
            *[mt.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)],
            mt.RandScaleIntensityd("image", 0.1, prob=1.0, channel_wise=True),
            mt.RandShiftIntensityd("image", 0.1, prob=1.0, channel_wise=True),
        ]
    )
    data = CacheDataset(cases * 200, augment, cache_rate=0.0, progress=False)
    loader = iter(DataLoader(data, batch_size=2, shuffle=True, num_workers=1, drop_last=True))
    net = SegResNet(init_filters=16, in_channels=4, out_channels=3, dropout_prob=0.2)
    loss_of = DiceLoss(sigmoid=True, squared_pred=True, smooth_nr=0, smooth_dr=1e-5)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, options.steps, 0.9)
    began = time.monotonic()
    for step in range(options.steps):
        try:
            batch = next(loader)
        except StopIteration:
            loader = iter(DataLoader(data, batch_size=2, shuffle=True, num_workers=1, drop_last=True))
            batch = next(loader)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(batch["image"].as_tensor())
        loss = loss_of(logits.float(), region_targets(batch["label"].as_tensor()[:, 0], task.label_map))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(
                f"step {step} of {options.steps}, loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True
            )
    trained_s = time.monotonic() - began
    net.eval()

    def forward(image: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return net(image).float()

    for case in task.split.val:
        probs = infer.to_native(
            infer.region_probs(forward, task.cache.read(case, "image"), recipe), task.grid(case).native
        )
        scores = metrics.score_case(task.label_map.label(probs), task.reference(case), task.label_map)
        print(json.dumps({"case": case, "trained_s": round(trained_s), **{k: round(v, 4) for k, v in scores.items()}}))


if __name__ == "__main__":
    main()
