"""Near-duplicates: every kind of known copy is found, and nothing else is."""

import csv
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from medcls import keypoints
from medcls.cache import ImageCache
from medcls.duplicates import NEAR_BITS, conflicts, joined, leaked_paths, near_pairs, same_bytes
from medcls.phantom import COPY_KINDS, write_dataset
from medcls.preparation import prepare_folder
from medtrain.splits import Split


def test_near_pairs_equal_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, (40, 8, 4), dtype=np.uint64)
    hashes[7, 3] = hashes[30, 0] ^ np.uint64(0b1011)  # 12 bits away, under one turn
    hashes[20, 0] = hashes[21, 0]
    plain = {
        (i, j) for i in range(40) for j in range(i + 1, 40)
        if min(np.bitwise_count(hashes[i, t] ^ hashes[j, 0]).sum() for t in range(8)) <= NEAR_BITS
    }  # fmt: skip
    assert plain == {(7, 30), (20, 21)}
    for block in (1, 7, 512):
        assert {tuple(pair) for pair in near_pairs(hashes, block=block).tolist()} == plain


def test_groups_close_over_chains_and_are_numbered_by_their_first_image() -> None:
    assert joined(7, np.array([[4, 1], [5, 4], [2, 6]])).tolist() == [0, 1, 2, 3, 1, 1, 2]
    assert joined(3, np.zeros((0, 2), np.int64)).tolist() == [0, 1, 2]
    assert same_bytes([b"a", b"b", b"a", b"b", b"c"]).tolist() == [0, 1, 0, 1, 4]
    assert conflicts([b"a", b"b", b"a", b"b"], [0, 1, 0, 2]) == [[1, 3]]


def test_every_kind_of_copy_is_found_and_nothing_else(tmp_path: Path) -> None:
    """Recall and precision on phantoms with known copies: 60 a class, 5 classes, 75 copies of ten kinds."""
    data = write_dataset(tmp_path / "data", images=60, size=160, seed=9)
    cache = ImageCache(prepare_folder(data, tmp_path / "c.h5", workers=2))
    group = dict(zip(cache.ids, cache.group.tolist(), strict=True))
    truth: dict[str, str] = {}
    found: dict[str, list[bool]] = defaultdict(list)
    with open(data / "phantom_truth.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            truth[row["path"]] = row["source"]
            found[row["kind"]].append(group[row["path"]] == group[row["source"]])
    assert set(found) == set(COPY_KINDS)
    for kind in ("exact", "flip", "turn", "brightness", "jpeg", "resize"):
        assert all(found[kind]), kind
    assert np.mean([hit for hits in found.values() for hit in hits]) >= 0.97
    sources = defaultdict(set)
    for path in cache.ids:
        sources[group[path]].add(truth.get(path, path))
    assert max(map(len, sources.values())) == 1  # no group joins two photographs


def test_a_file_under_two_cancers_hides_no_copy(tmp_path: Path) -> None:
    """Images are compared within a cancer: one that lies under another cancer, too, is still among them."""
    data = write_dataset(tmp_path / "data", images=4, size=96, seed=4, copies=0)
    there = data / "Oral Cancer" / "oral_normal"
    shutil.copy(next((data / "Brain Cancer" / "brain_glioma").iterdir()), there / "same.jpg")
    ImageOps.mirror(Image.open(there / "same.jpg")).save(there / "mirrored.jpg", quality=95)
    cache = ImageCache(prepare_folder(data, tmp_path / "c.h5"))
    near = dict(zip(cache.ids, cache.near.tolist(), strict=True))
    same = "Oral Cancer/oral_normal/same.jpg"
    assert near[same] == near["Oral Cancer/oral_normal/mirrored.jpg"]
    assert sum(group == near[same] for group in near.values()) == 3


def test_keypoints_tell_a_moved_copy_from_another_image() -> None:
    from medcls.phantom import make_image

    base = Image.fromarray(make_image(1, "Oral Cancer", "oral_scc", 0, size=200))
    moved = base.rotate(9, Image.Resampling.BILINEAR, translate=(12, -15)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    other = Image.fromarray(make_image(1, "Oral Cancer", "oral_scc", 1, size=200))
    flat = Image.new("RGB", (200, 200), "pink")
    made = [keypoints.features(image) for image in (base, moved, other, flat, flat)]
    places, descriptors = (np.stack([pair[n] for pair in made]) for n in range(2))
    assert places.dtype == np.float16
    assert np.isnan(places[3]).all()
    assert keypoints.copy_pairs(places, descriptors).tolist() == [[0, 1]]
    best = max(keypoints.agreement(places[0, s], descriptors[0, s], places[1, 0], descriptors[1, 0]) for s in (0, 1))
    assert best > 2 * keypoints.agreement(places[0, 0], descriptors[0, 0], places[2, 0], descriptors[2, 0])


def test_leaked_images_are_counted_once(image_cache: Path) -> None:
    cache = ImageCache(image_cache)
    count = Counter(cache.group.tolist())
    twins = [path for path, g in zip(cache.ids, cache.group.tolist(), strict=True) if count[g] > 1]
    assert len(twins) > 10
    split = Split(train=tuple(cache.ids), val=(), test=tuple(cache.ids))
    assert leaked_paths(cache, split) == list(cache.ids)
    alone = [path for path in cache.ids if path not in twins]
    assert leaked_paths(cache, Split(train=tuple(alone), val=(), test=tuple(twins))) == []
