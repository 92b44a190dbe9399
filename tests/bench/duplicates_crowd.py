"""Recall of the keypoint search in a crowd as large as a published cancer: copies of some images among many others.

The crowd is made of elastic deformations of other images, which have the same local structure and are no copies.
"""

import argparse
import time
from collections import defaultdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Features = tuple[np.ndarray, np.ndarray]


def deformed(job: tuple[str, int]) -> Features:
    """Features of a file under a strong smooth deformation, a flip and another contrast."""
    from scipy import ndimage

    from medcls.keypoints import features

    path, seed = job
    rng = np.random.default_rng(seed)
    image = np.asarray(Image.open(path).convert("L").resize((256, 256), Image.Resampling.BOX), np.float32)
    field = [ndimage.zoom(rng.normal(0, 14, (6, 6)), 256 / 6, order=3) for _ in range(2)]
    rows, columns = np.mgrid[:256, :256]
    image = ndimage.map_coordinates(image, (rows + field[0], columns + field[1]), order=1, mode="nearest")
    image = np.flip(image, int(rng.integers(2))) ** rng.uniform(0.8, 1.2)
    image = image / max(1.0, float(image.max())) * 255
    return features(Image.fromarray(image.astype(np.uint8)).convert("RGB"))


def copied(job: tuple[str, str, int]) -> Features:
    """Features of a copy of a file, of a kind of `medcls.phantom.COPY_KINDS`; kind "" is the file itself."""
    import io

    from medcls.keypoints import features
    from medcls.phantom import make_copy

    path, kind, seed = job
    content = Path(path).read_bytes()
    if kind:
        content = make_copy(np.random.default_rng(seed), kind, content)
    return features(Image.open(io.BytesIO(content)).convert("RGB"))


def stacked(parts: list[Features]) -> Features:
    """Features of many images as two arrays."""
    return np.stack([places for places, _ in parts]), np.stack([descriptors for _, descriptors in parts])


def main() -> None:
    """Measure and print."""
    from record import record

    from medcls.duplicates import joined
    from medcls.keypoints import copy_pairs
    from medcls.phantom import COPY_KINDS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with JPEG files below (default: multicancer_mini)")
    parser.add_argument("--crowd", type=int, default=15_000)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    data = options.data or Path(__file__).resolve().parents[3] / "shared" / "data" / "multicancer_mini"
    files = sorted(map(str, data.rglob("*.jpg")))
    sources, others = files[::2], files[1::2]
    kinds = [COPY_KINDS[n % len(COPY_KINDS)] for n in range(len(sources))]
    jobs: Any = [(path, "", 0) for path in sources]
    jobs += [(path, kind, n) for n, (path, kind) in enumerate(zip(sources, kinds, strict=True))]
    with get_context("spawn").Pool(2) as pool:
        known = pool.map(copied, jobs, 16)
        crowd = pool.map(deformed, [(others[n % len(others)], n) for n in range(options.crowd)], 64)
    places, descriptors = stacked([*known, *crowd])
    began = time.monotonic()
    group = joined(len(places), copy_pairs(places, descriptors))
    spent = time.monotonic() - began
    hits: dict[str, list[bool]] = defaultdict(list)
    for n, kind in enumerate(kinds):
        hits[kind].append(bool(group[n] == group[n + len(sources)]))
    words = f"{len(sources)} images of {data.name}, one copy each, among {len(crowd)} deformed others"
    for kind, found in hits.items():
        record("duplicates", f"recall in a crowd, {kind}", sum(found) / len(found), "share",
               conditions=f"{words}; {len(found)} copies", packages=("opencv-python-headless",),
               keep=options.record)  # fmt: skip
    known_groups = set(group[: 2 * len(sources)].tolist())
    wrong = sum(g in known_groups for g in group[2 * len(sources) :].tolist())
    record("duplicates", "crowd images joined to a source", wrong, "images", conditions=words,
           packages=("opencv-python-headless",), keep=options.record)  # fmt: skip
    record("duplicates", "keypoint search in a crowd", 1000 * spent / len(places), "ms an image", conditions=words,
           packages=("opencv-python-headless", "scipy"), keep=options.record)  # fmt: skip


if __name__ == "__main__":
    main()
