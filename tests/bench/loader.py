"""Augmented samples a second through DALI against MONAI's dictionary transforms with as many workers."""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def rate(batches: Any, batch: int, count: int) -> float:
    """Samples a second over `count` batches, after four."""
    iterator = iter(batches)
    for _ in range(4):
        next(iterator)
    began = time.perf_counter()
    for _ in range(count):
        next(iterator)
    return count * batch / (time.perf_counter() - began)


def ours(cache: Any, augment: Any, crop: int, workers: int, threads: int) -> Any:
    """Our loader at batch 2."""
    from medseg.augment import VolumeSource
    from medseg.pipeline import VolumeLoader
    from medtrain.sampling import Stream

    stream = Stream(0, len(cache.ids), 2)
    operations = [name for name in augment.operations if name != "warp"]  # the workers warp
    source = VolumeSource(str(cache.path), tuple(cache.ids), (crop,) * 3, augment, stream)
    return VolumeLoader(source, batch=2, channels=4, crop=(crop,) * 3, operations=operations, workers=workers,
                        threads=threads)  # fmt: skip


def monais(cache: Any, rotate: float, crop: int, workers: int) -> Any:
    """The same operations on tensors that lie in memory already."""
    from monai import transforms as mt
    from monai.data import DataLoader, Dataset

    keys = ["image", "label"]
    steps: list[Any] = [mt.RandSpatialCropd(keys, (crop,) * 3, random_size=False)]
    if rotate:
        turn = (np.radians(15),) * 3
        steps.append(mt.RandAffined(keys, prob=rotate, rotate_range=turn, padding_mode="zeros",
                                    mode=("bilinear", "nearest")))  # fmt: skip
    steps += [mt.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)]
    steps.append(mt.RandScaleIntensityd("image", 0.1, prob=1.0, channel_wise=True))
    steps.append(mt.RandShiftIntensityd("image", 0.1, prob=1.0, channel_wise=True))
    cases = [
        {"image": cache.read(c, "image").astype(np.float32), "label": cache.read(c, "label")[None]} for c in cache.ids
    ]
    data = Dataset(cases * 100, mt.Compose([mt.EnsureTyped(keys), *steps]))
    return DataLoader(data, batch_size=2, shuffle=True, num_workers=workers)


def main() -> None:
    """Measure both in one run."""
    import torch
    import volumes
    from record import record

    from medseg.augment import Augment
    from medseg.cache import Cache
    from medseg.preparation import Preparation, prepare_dataset

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data, words = volumes.folder(place, options.data)
        cache = Cache(prepare_dataset(data, place / "c.h5", Preparation(), workers=2))
        for crop, rotate, workers, threads, count in (
            (128, 0.0, 1, 1, 40), (128, 0.2, 1, 1, 60), (128, 0.2, 2, 2, 60), (64, 0.2, 1, 1, 200),
        ):  # fmt: skip
            value = rate(ours(cache, Augment(rotate=rotate), crop, workers, threads), 2, count)
            peer_value = rate(monais(cache, rotate, crop, workers), 2, count)
            record("loader", f"crop {crop}^3, rotation p {rotate}, {workers} workers", value, "samples/s",
                   peer="MONAI transforms on tensors in RAM", peer_value=peer_value, ratio=value / peer_value,
                   target=">= 2", conditions=f"{words}, batch 2, {threads} DALI threads",
                   packages=("nvidia-dali-cuda130", "monai", "torch"), keep=options.record)  # fmt: skip


if __name__ == "__main__":
    main()
