"""Copies that were turned, shifted, zoomed or recoloured, found by local features.

ORB keypoints (Rublee et al., 2011) survive small rotations, shifts, zooms and brightness, which move every bit of a
whole-image hash. Images that share many quantised descriptors are candidates (an inverted index); a candidate is a copy
if enough keypoints agree on one similarity transform (RANSAC).

N images, P keypoints of an image.
"""

from collections.abc import Iterator

import cv2
import numpy as np
from PIL import Image
from scipy import sparse
from scipy.cluster.hierarchy import DisjointSet

POINTS = 160  # at most, of one image
SIDE = 256  # pixels of the square that they are found in
TABLES, BITS = 6, 20  # words: six fixed choices of 20 of a descriptor's 256 bits
WORK = 60_000  # word comparisons an image: the most common words are left out until they are no more
NEIGHBOURS = 8  # candidates of an image at most; the copies of one image link through each other
FAR = 64  # bits of 256 by which matched descriptors may differ
REACH = 4.0  # pixels by which a keypoint may miss the transform
ROWS = 128  # images whose candidates are counted at once
INLIERS = 32  # keypoints that must agree
ZOOM = 1.35  # of the transform at most, and at least its inverse

_CHOSEN = [np.random.default_rng(n).choice(256, BITS, replace=False) for n in range(TABLES)]


def features(rgb: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints of an image and of its mirror image: places (2,P,2) float16 in pixels, and descriptors (2,P,32) uint8.

    P is POINTS; rows beyond those found are NaN and 0.
    """
    cv2.setNumThreads(1)
    finder = cv2.ORB.create(nfeatures=POINTS, nlevels=6, edgeThreshold=12, patchSize=25, fastThreshold=5)
    grey = np.asarray(rgb.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))
    places = np.full((2, POINTS, 2), np.nan, np.float16)
    descriptors = np.zeros((2, POINTS, 32), np.uint8)
    for side, view in enumerate((grey, np.ascontiguousarray(grey[:, ::-1]))):
        points, found = finder.detectAndCompute(view, None)
        count = min(len(points), POINTS)
        if count:
            places[side, :count] = [point.pt for point in points[:count]]
            descriptors[side, :count] = found[:count]
    return places, descriptors


def copy_pairs(places_N2P2: np.ndarray, descriptors_N2P32: np.ndarray) -> np.ndarray:
    """(M,2) pairs i < j of which one is a copy of the other. Pairs that are linked through others may be left out.

    Work grows with N, not with its square.
    """
    joined = DisjointSet(range(len(places_N2P2)))
    found = []
    for i, others in enumerate(_candidates(places_N2P2, descriptors_N2P32)):
        for j in others.tolist():
            if joined.connected(i, j):
                continue
            sides = ((places_N2P2[i, side], descriptors_N2P32[i, side]) for side in range(2))
            if any(agreement(*side, places_N2P2[j, 0], descriptors_N2P32[j, 0]) >= INLIERS for side in sides):
                joined.merge(i, j)
                found.append((min(i, j), max(i, j)))
    return np.array(sorted(found), np.int64).reshape(-1, 2)


def agreement(places_P2: np.ndarray, descriptors_P32: np.ndarray, others_P2: np.ndarray,
              other_descriptors_P32: np.ndarray) -> int:  # fmt: skip
    """How many keypoints of two images agree on one rotation, shift and zoom."""
    mine, theirs = ~np.isnan(places_P2[:, 0]), ~np.isnan(others_P2[:, 0])
    if mine.sum() < INLIERS or theirs.sum() < INLIERS:
        return 0
    matcher = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True)
    pairs = matcher.match(descriptors_P32[mine], other_descriptors_P32[theirs])
    pairs = [pair for pair in pairs if pair.distance <= FAR]
    if len(pairs) < INLIERS:
        return 0
    start = places_P2[mine][[pair.queryIdx for pair in pairs]].astype(np.float32)
    end = others_P2[theirs][[pair.trainIdx for pair in pairs]].astype(np.float32)
    transform, inside = cv2.estimateAffinePartial2D(start, end, ransacReprojThreshold=REACH, maxIters=500)
    if transform is None or not 1 / ZOOM < np.hypot(transform[0, 0], transform[1, 0]) < ZOOM:
        return 0
    return int(inside.sum())


def _candidates(places_N2P2: np.ndarray, descriptors_N2P32: np.ndarray) -> Iterator[np.ndarray]:
    """For each image, those that share the most and the rarest words with it or with its mirror image, best first.

    A shared word counts log(N / images that have it).
    """
    plain, mirrored = (_index(places_N2P2[:, side], descriptors_N2P32[:, side]) for side in range(2))
    count = len(places_N2P2)
    holders = np.bincount(plain.indices, minlength=plain.shape[1])
    order = np.argsort(holders, kind="stable")
    affordable = np.cumsum(holders[order].astype(np.float64) ** 2) <= WORK * count
    weight = np.zeros(len(holders), np.float32)
    told = order[affordable & (holders[order] > 0)]
    weight[told] = np.log((count + 1) / holders[told])
    table = (plain @ sparse.diags_array(weight, dtype=np.float32)).tocsr()
    table.eliminate_zeros()
    turned = plain.T.tocsr()
    mirrored = (mirrored @ sparse.diags_array(weight, dtype=np.float32)).tocsr()
    mirrored.eliminate_zeros()
    for start in range(0, count, ROWS):
        rows = slice(start, start + ROWS)
        shared = (table[rows] @ turned).maximum(mirrored[rows] @ turned).tocsr()
        for n in range(shared.shape[0]):
            part = slice(shared.indptr[n], shared.indptr[n + 1])
            others, scores = shared.indices[part], shared.data[part]
            keep = others != start + n
            others, scores = others[keep], scores[keep]
            yield others[np.lexsort((others, -scores))[:NEIGHBOURS]]


def _index(places_NP2: np.ndarray, descriptors_NP32: np.ndarray) -> sparse.csr_array:
    """(N, words) matrix: 1 where an image has the word."""
    size = TABLES << BITS
    indices, ends = [], [0]
    weights = 1 << np.arange(BITS)
    for places, descriptors in zip(places_NP2, descriptors_NP32, strict=True):
        bits = np.unpackbits(descriptors[~np.isnan(places[:, 0])], axis=1)
        words = [(n << BITS) + bits[:, chosen] @ weights for n, chosen in enumerate(_CHOSEN)]
        unique = np.unique(np.concatenate(words))
        indices.append(unique)
        ends.append(ends[-1] + len(unique))
    joined = np.concatenate(indices)
    return sparse.csr_array((np.ones(len(joined), np.float32), joined, np.array(ends)), shape=(len(ends) - 1, size))
