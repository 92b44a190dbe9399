"""Random 128^3 x 4-channel float16 patches from the warm cache, one process, against three peers."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CROP, CASES = 128, 4


def milliseconds(read: Callable[[int], Any], count: int) -> float:
    """Median time of a read, after one read of each case."""
    for n in range(CASES):
        read(n)
    times = []
    for n in range(count):
        began = time.perf_counter()
        read(n)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def monai_reader(cache: Any, cases: list[str], place: Path) -> Callable[[int], Any]:
    """PersistentDataset of float32 tensors and RandSpatialCropd."""
    from monai.data import PersistentDataset
    from monai.transforms import Compose, EnsureTyped, RandSpatialCropd, Transform

    class FromCache(Transform):
        """What the deterministic part of a MONAI pipeline would end with."""

        def __call__(self, data: dict) -> dict:
            return {"image": cache.read(data["case"], "image").astype(np.float32)}

    steps = Compose([FromCache(), EnsureTyped("image"), RandSpatialCropd("image", (CROP,) * 3, random_size=False)])
    dataset = PersistentDataset([{"case": case} for case in cases], steps, cache_dir=place / "persistent")
    return lambda n: dataset[n % CASES]


def tutorial_reader(data: Path, place: Path) -> Callable[[int], Any]:
    """PersistentDataset as MONAI's brain-tumour tutorial fills it: whole scans from the files, z-scored, then crop."""
    from monai import transforms as mt
    from monai.data import PersistentDataset

    files = sorted((data / "imagesTr").glob("*.nii.gz"))[:CASES]
    steps = mt.Compose(
        [
            mt.LoadImaged("image"),
            mt.EnsureChannelFirstd("image"),
            mt.EnsureTyped("image"),
            mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True),
            mt.RandSpatialCropd("image", (CROP,) * 3, random_size=False),
        ]
    )
    dataset = PersistentDataset([{"image": str(file)} for file in files], steps, cache_dir=place / "tutorial")
    return lambda n: dataset[n % CASES]


def blosc2_reader(cache: Any, cases: list[str], place: Path, boxes: list) -> Callable[[int], Any]:
    """nnU-Net v2's form: zstd level 8, chunks 128^3, blocks 64^3, float32, memory-mapped, one thread."""
    import blosc2

    blosc2.set_nthreads(1)
    files = []
    for case in cases:
        image = cache.read(case, "image").astype(np.float32)
        file = str(place / f"{case}.b2nd")
        chunks = tuple(min(a, b) for a, b in zip((4, 128, 128, 128), image.shape, strict=True))
        blocks = tuple(min(a, b) for a, b in zip((1, 64, 64, 64), image.shape, strict=True))
        blosc2.asarray(image, urlpath=file, chunks=chunks, blocks=blocks, mode="w",
                       cparams={"codec": blosc2.Codec.ZSTD, "clevel": 8})  # fmt: skip
        files.append(file)

    def read(n: int) -> Any:
        array = blosc2.open(files[n % CASES], mode="r", mmap_mode="r", dparams={"nthreads": 1})
        start, stop = boxes[n]
        return array[(slice(None), *(slice(a, b) for a, b in zip(start, stop, strict=True)))]

    return read


def main() -> None:
    """Measure all in one run."""
    import torch
    import volumes
    from record import record

    from medseg.cache import Cache
    from medseg.preparation import Preparation, prepare_dataset

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data, words = volumes.folder(place, options.data)
        cache = Cache(prepare_dataset(data, place / "c.h5", Preparation(), workers=2))
        cases = cache.ids[:CASES]
        rng = np.random.default_rng(0)
        boxes = []
        for n in range(options.count):
            sizes = np.array(cache.array(cases[n % CASES], "image").shape[1:])
            start = rng.integers(0, sizes - CROP + 1)
            boxes.append((start.tolist(), (start + CROP).tolist()))
        in_memory = [cache.read(case, "image") for case in cases]

        def copy(n: int) -> np.ndarray:
            start, stop = boxes[n]
            box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
            return np.ascontiguousarray(in_memory[n % CASES][(slice(None), *box)])

        ours = milliseconds(lambda n: cache.patch(cases[n % CASES], "image", *boxes[n]), options.count)
        peers = {
            "NumPy copy from RAM": (milliseconds(copy, options.count), ">= 0.8"),
            "blosc2 as nnU-Net v2": (milliseconds(blosc2_reader(cache, cases, place, boxes), options.count), ">= 8"),
            "MONAI PersistentDataset of whole scans": (milliseconds(tutorial_reader(data, place), 20), ">= 40"),
            "MONAI PersistentDataset of our brain crops": (milliseconds(monai_reader(cache, cases, place), 20), ""),
        }
        for peer, (value, target) in peers.items():
            record("patch_read", "4x128^3 float16 patch", ours, "ms", peer=peer, peer_value=value, ratio=value / ours,
                   target=target, conditions=f"{words}, warm, 1 process, median of {options.count}",
                   packages=("h5py", "blosc2", "monai", "torch"), keep=options.record)  # fmt: skip


if __name__ == "__main__":
    main()
