"""Near-duplicates: which images show the same photograph, and how many of them lie on both sides of a split.

N images; a hash is 256 bits, (4,) uint64.
"""

from collections.abc import Collection, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medcls.cache import ImageCache
from medcls.keypoints import copy_pairs
from medtrain.splits import Split

# Bits of 256 that may differ. Recompressed, resized, brightened, flipped and turned copies of real MRIs differ by at
# most 16, other images of the same set rarely by less than 30 (docs/splits.md).
NEAR_BITS = 24


def near_pairs(hashes_N84: np.ndarray, *, block: int = 512) -> np.ndarray:
    """(M,2) pairs i < j that link all images whose hashes differ by at most NEAR_BITS under one of the eight flips and
    quarter turns; pairs that are linked through others may be left out, so M < N.

    hashes_N84 (N,8,4) uint64 as `images.perceptual_hashes` makes them. Every pair is compared; memory is bounded by
    `block` rows at a time.
    """
    plain = np.ascontiguousarray(hashes_N84[:, 0])
    count = len(plain)
    links = np.zeros((0, 2), np.int64)
    for start in range(0, count, block):
        stop = min(start + block, count)
        rest = plain[start:]
        near = np.zeros((stop - start, len(rest)), bool)
        for turn in range(hashes_N84.shape[1]):
            distance = np.zeros(near.shape, np.uint16)
            for word in range(4):
                distance += np.bitwise_count(hashes_N84[start:stop, turn, word, None] ^ rest[None, :, word])
            near |= distance <= NEAR_BITS
        i, j = np.nonzero(near)
        fresh = np.stack([i, j], 1)[j > i] + start
        if len(fresh):  # keep a link from each image to the first of its group, not every pair
            first = _first_of_group(count, np.concatenate([links, fresh]))
            links = np.stack([first, np.arange(count)], 1)[first < np.arange(count)]
    return links


def _first_of_group(count: int, pairs: np.ndarray) -> np.ndarray:
    """(N,) the first image of each image's group, closed over chains of pairs."""
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, label = connected_components(graph, directed=False)
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    return first[inverse]


def similar_pairs(hashes_N84: np.ndarray, places_N2P2: np.ndarray, descriptors_N2P32: np.ndarray) -> np.ndarray:
    """(M,2) pairs i < j that show the same photograph by their hashes or by their keypoints."""
    return np.concatenate([near_pairs(hashes_N84), copy_pairs(places_N2P2, descriptors_N2P32)])


def same_bytes(digests: Sequence[bytes]) -> np.ndarray:
    """(N,) index of the first image with the same bytes."""
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(digest, n) for n, digest in enumerate(digests)], np.int64)


def joined(count: int, pairs: np.ndarray) -> np.ndarray:
    """(N,) int32 group of each of `count` images: closed over chains of pairs, numbered by their first image."""
    return np.unique(_first_of_group(count, pairs), return_inverse=True)[1].astype(np.int32)


def conflicts(digests: Sequence[bytes], targets: Sequence[int]) -> list[list[int]]:
    """Images with the same bytes under different classes, as lists of indices."""
    holders: dict[bytes, list[int]] = {}
    for n, digest in enumerate(digests):
        holders.setdefault(digest, []).append(n)
    return [held for held in holders.values() if len({targets[n] for n in held}) > 1]


def leaked_paths(cache: ImageCache, split: Split) -> list[str]:
    """The test images that have a near-duplicate among the training images."""
    return relatives(cache, cache.near, split.train, split.test)


def relatives(cache: ImageCache, group_N: np.ndarray, seen: Collection[str], paths: Sequence[str]) -> list[str]:
    """Those of `paths` that lie in a group of some image that was seen; what is not in the cache has none."""
    group = dict(zip(cache.ids, group_N.tolist(), strict=True))
    known = {group[path] for path in seen if path in group}
    return [path for path in paths if group[path] in known]
