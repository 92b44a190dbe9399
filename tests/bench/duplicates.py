"""Recall and precision of the near-duplicate groups by kind of copy, and their time an image, where copies are known:
phantoms, and real images of which one copy each is made here.
"""

import argparse
import csv
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path


def with_copies(data: Path, place: Path) -> dict[str, tuple[str, str]]:
    """Copy a folder of classes and add one changed copy of every image beside it; returns copy -> (source, kind)."""
    import numpy as np

    from medcls.phantom import COPY_KINDS, make_copy

    shutil.copytree(data, place)
    truth = {}
    for n, path in enumerate(sorted(place.rglob("*.jpg"))):
        kind = COPY_KINDS[n % len(COPY_KINDS)]
        copy = path.with_name(f"copy_{path.name}")
        copy.write_bytes(make_copy(np.random.default_rng(n), kind, path.read_bytes()))
        truth[copy.relative_to(place).as_posix()] = (path.relative_to(place).as_posix(), kind)
    return truth


def phantoms(place: Path, images: int) -> dict[str, tuple[str, str]]:
    """Phantoms with their own truth."""
    from medcls.phantom import write_dataset

    write_dataset(place, images=images, workers=2)
    with open(place / "phantom_truth.csv", newline="", encoding="utf-8") as file:
        return {row["path"]: (row["source"], row["kind"]) for row in csv.DictReader(file)}


def near(copy: Path, source: Path) -> bool:
    """Whether the perceptual hashes alone call two files near."""
    import numpy as np
    from PIL import Image

    from medcls.duplicates import near_pairs
    from medcls.images import perceptual_hashes

    return (
        len(near_pairs(np.stack([perceptual_hashes(Image.open(path).convert("RGB")) for path in (copy, source)]))) > 0
    )


def main() -> None:
    """Measure and print; groups that join different photographs are listed, so that one can look at them."""
    from record import record

    from medcls.cache import ImageCache
    from medcls.preparation import prepare_folder

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    real = Path(__file__).resolve().parents[3] / "shared" / "data" / "multicancer_mini"
    packages = ("imagehash", "opencv-python-headless")
    with tempfile.TemporaryDirectory() as folder:
        sets = [("phantoms, 300 a class", lambda place: phantoms(place, 300))]
        if real.is_dir():
            sets.append(("multicancer_mini with one copy of each", lambda place: with_copies(real, place)))
        for number, (words, make) in enumerate(sets):
            place = Path(folder) / f"data{number}"
            truth = make(place)
            began = time.monotonic()
            cache = ImageCache(prepare_folder(place, Path(folder) / f"{number}.h5", workers=2))
            spent = time.monotonic() - began
            group = dict(zip(cache.ids, cache.group.tolist(), strict=True))
            hits, hashed = defaultdict(list), defaultdict(list)
            for copy, (source, kind) in truth.items():
                hits[kind].append(group[copy] == group[source])
                hashed[kind].append(near(place / copy, place / source))
            sources = defaultdict(set)
            for path in cache.ids:
                sources[group[path]].add(truth.get(path, (path, ""))[0])
            odd = [sorted(names) for names in sources.values() if len(names) > 1]
            for names in odd:
                print("one group:", ", ".join(names))
            conditions = f"{words}, {len(cache.ids)} images"
            for kind, found in hits.items():
                record("duplicates", f"recall, {kind} copies of {words}", sum(found) / len(found), "share",
                       peer="perceptual hash alone", peer_value=sum(hashed[kind]) / len(found),
                       conditions=f"{conditions}, {len(found)} copies", packages=packages,
                       keep=options.record)  # fmt: skip
            several = sum(1 for names in sources.values() if len(names) > 1)
            joined = sum(1 for count in _sizes(cache) if count > 1)
            record("duplicates", f"groups of one photograph, {words}", (joined - several) / joined, "share",
                   conditions=f"{conditions}, {joined} groups, {several} of them join several files of the set",
                   packages=packages, keep=options.record)  # fmt: skip
            record("duplicates", f"preparation with groups, {words}", 1000 * spent / len(cache.ids), "ms an image",
                   conditions=f"{conditions}, 2 processes", packages=packages, keep=options.record)  # fmt: skip


def _sizes(cache: object) -> list[int]:
    import numpy as np

    return np.bincount(cache.group).tolist()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
