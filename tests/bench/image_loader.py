"""Decoded, augmented 224-pixel images a second from the cache through our loader against torchvision's and timm's
loaders on the same files with the same number of processes; cold listing of 100,000 images; private memory of a worker.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SIZE, BATCH = 224, 32


def ours(path: Path, workers: int, colour: bool) -> Any:
    """Our loader: random-resized crop, flips, colours if asked, normalised."""
    from medcls.augment import Augment, ImageSource
    from medcls.cache import ImageCache
    from medcls.pipeline import ImageLoader
    from medtrain.sampling import Stream

    cache = ImageCache(path)
    amount = 0.2 if colour else 0.0
    augment = Augment(scale=(0.5, 1.0), brightness=amount, contrast=amount, saturation=amount)
    source = ImageSource(str(path), np.arange(len(cache.ids)), cache.target.astype(np.int64), augment,
                         Stream(0, len(cache.ids), BATCH), SIZE)  # fmt: skip
    return ImageLoader(source, batch=BATCH, size=SIZE, operations=augment.operations, mean=(0.485, 0.456, 0.406),
                       std=(0.229, 0.224, 0.225), decoded=True, workers=workers, threads=workers)  # fmt: skip


def peers(folder: Path, workers: int, colour: bool) -> dict[str, Any]:
    """torchvision's ImageFolder and timm's loader, with the same augmentation."""
    import torch

    from medcls import backbones

    timm = backbones.timm()
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(SIZE, (0.5, 1.0), (0.8, 1.25)), transforms.RandomHorizontalFlip(),
             transforms.RandomVerticalFlip()]  # fmt: skip
    if colour:
        steps.append(transforms.ColorJitter(0.2, 0.2, 0.2))
    normal = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    data = datasets.ImageFolder(str(folder), transforms.Compose([*steps, transforms.ToTensor(), normal]))
    many = torch.utils.data.ConcatDataset([data] * 20)
    plain = torch.utils.data.DataLoader(many, BATCH, shuffle=True, num_workers=workers, drop_last=True)
    made = timm.data.ImageDataset(str(folder))
    options = {"scale": (0.5, 1.0), "ratio": (0.8, 1.25), "vflip": 0.5, "color_jitter": 0.2 if colour else None}
    timms = timm.data.create_loader(made, (3, SIZE, SIZE), BATCH, is_training=True, num_workers=workers,
                                    use_prefetcher=False, **options)  # fmt: skip

    def endless() -> Any:
        while True:
            yield from timms

    return {"torchvision ImageFolder + DataLoader": plain, "timm create_loader": endless()}


def cold_listing(path: Path) -> float:
    """Seconds to open a cache and hold every path, class and group, in a new process, after dropping it from memory."""
    subprocess.run(["sync"], check=False)
    with open(path, "rb") as file:
        import os

        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    code = (
        "import sys, time; from medcls.cache import ImageCache; b = time.perf_counter(); "
        "c = ImageCache(sys.argv[1]); assert len(c.ids) == len(c.target) == len(c.group); "
        "print(time.perf_counter() - b)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def big_cache(path: Path, count: int) -> Path:
    """A cache of `count` tiny images with paths as long as real ones."""
    from medcls.cache import Images, digest, write_images

    content = bytes(range(200))
    sums = np.tile(np.frombuffer(digest(content), np.uint8), (1000, 1))

    def parts() -> Any:
        for start in range(0, count, 1000):
            paths = [f"Lung and Colon Cancer/lung_bnt/lung_bnt_{n:06}.jpg" for n in range(start, start + 1000)]
            columns = {"target": np.zeros(1000, np.int32), "size": np.full((1000, 2), 512, np.int32),
                       "checksum": sums, "histogram": np.zeros((1000, 160), np.float32)}  # fmt: skip
            yield Images([content] * 1000, paths, columns)

    write_images(path, parts(), size=count * len(content), groups=np.arange(count), classes=[("a", "b")], facts={},
                 preparation={})  # fmt: skip
    return path


def main() -> None:
    """Measure all in one run."""
    import torch
    from loader import rate
    from memory import largest_private
    from record import record

    from medcls.preparation import prepare_folder

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of class folders in a cancer's folder (default: phantoms)")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    packages = ("nvidia-dali-cuda130", "torchvision", "timm", "pillow", "torch")
    with tempfile.TemporaryDirectory() as place:
        data, words = options.data, "phantom images of 512 pixels"
        real = Path(__file__).resolve().parents[3] / "shared" / "data" / "multicancer_mini"
        if data is None and real.is_dir():
            data, words = real, "multicancer_mini, 360 real MRIs, most 512 pixels"
        if data is None:
            from medcls.phantom import write_dataset

            data = write_dataset(Path(place) / "data", images=60, size=512, cancers=("Brain Cancer",))
        folder = next(path for path in sorted(data.iterdir()) if path.is_dir())
        cache = prepare_folder(data, Path(place) / "c.h5", workers=2)
        for colour in (False, True):
            for workers in (1, 2):
                value = rate(ours(cache, workers, colour), BATCH, 60)
                for name, batches in peers(folder, workers, colour).items():
                    peer = rate(batches, BATCH, 30)
                    what = f"{'crop, flips, colours' if colour else 'crop, flips'}, {workers} workers"
                    record("image_loader", what, value, "images/s", peer=name, peer_value=peer, ratio=value / peer,
                           target=">= 1.5", conditions=f"{words}, batch {BATCH}, {SIZE} pixels", packages=packages,
                           keep=options.record)  # fmt: skip
        big = big_cache(Path(place) / "big.h5", 100_000)
        record("image_loader", "cold listing of 100,000 images", cold_listing(big), "s", target="<= 1",
               conditions="new process, file dropped from the page cache", packages=("h5py",),
               keep=options.record)  # fmt: skip
        for workers in (1, 2):
            value = largest_private(ours(cache, workers, True), 20)
            record("image_loader", f"private memory of a worker, {workers} workers", value, "MB", target="<= 250",
                   conditions=words, packages=packages, keep=options.record)  # fmt: skip


if __name__ == "__main__":
    main()
