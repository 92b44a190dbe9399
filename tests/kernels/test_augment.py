"""One gather from resident volumes against the NumPy reference that the DALI pipeline is held to, row by row."""

import numpy as np
import pytest
import torch
from kernel_checks import DEVICE

from medkernels.augment import Volumes, augment, fused
from medseg import rows
from medseg.augment import Augment, Draw, apply, draw

CROP = (6, 7, 5)
SIZES = [(9, 8, 11), (6, 7, 5), (13, 10, 7)]
C = 2
KINDS = {
    "crop alone": Augment(flip=0, scale=0, shift=0), "flips": Augment(flip=0.7, scale=0, shift=0),
    "intensity": Augment(flip=0), "rotation": Augment(rotate=1, degrees=40, flip=0.5),
    "zoom": Augment(zoom=1, zoom_range=(0.4, 2.0)), "all": Augment(rotate=0.6, zoom=0.6),
}  # fmt: skip


def cases(kind: type = np.float16) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        ((rng.random((C, *size)) * (255 if kind is np.uint8 else 3)).astype(kind),
         rng.integers(0, 4, size).astype(np.uint8)) for size in SIZES
    ]  # fmt: skip


def volumes(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Volumes:
    return Volumes.pack([(torch.from_numpy(i), torch.from_numpy(label)) for i, label in pairs], DEVICE)


def samples(kind: Augment, seed: int) -> list[Draw]:
    rng = np.random.default_rng(seed)
    return [draw(rng, kind, C, str(case), size, CROP, None) for case, size in enumerate(SIZES)]


def gathered(store: Volumes, drawn: list[Draw], impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    parameters = torch.from_numpy(np.stack([sample.row for sample in drawn]))
    boxes = [(sample.start, sample.stop) for sample in drawn]
    return augment(store, [int(s.case) for s in drawn], boxes, parameters, rows.layout(C), CROP, impl=impl)


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("voxels", [np.float16, np.uint8], ids=["float16", "uint8"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_equals_the_reference_of_the_pipeline(kind: Augment, voxels: type, impl: str) -> None:
    """Largest difference 1e-4 of the range (float32 coordinates); labels differ in at most 1 voxel of 100, at ties."""
    pairs = cases(voxels)
    store, reach = volumes(pairs), 255 if voxels is np.uint8 else 3
    for seed in range(2):
        drawn = samples(kind, seed)
        images, labels = gathered(store, drawn, impl)
        for n, sample in enumerate(drawn):
            box = tuple(slice(a, b) for a, b in zip(sample.start, sample.stop, strict=True))
            image, label = (array[(..., *box)] for array in pairs[int(sample.case)])
            image, label = apply(image, label, sample.row, np.zeros((1, 1, 1, 1)), CROP)
            assert np.abs(images[n].cpu().numpy() - image).max() <= 1e-4 * reach
            assert (labels[n].cpu().numpy() != label).mean() <= (0.01 if sample.row[0] else 0)


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_volumes_smaller_than_the_crop(kind: Augment, impl: str) -> None:
    """As above; what is not warped is exact where it is not scaled, its margins too."""
    pairs = [(image[:, :d, :h, :w], label[:d, :h, :w])
             for (image, label), (d, h, w) in zip(cases(), [(4, 8, 3), (6, 3, 5), (1, 1, 1)], strict=True)]  # fmt: skip
    store = volumes(pairs)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        drawn = [draw(rng, kind, C, str(n), label.shape, CROP, None) for n, (_, label) in enumerate(pairs)]
        images, labels = gathered(store, drawn, impl)
        for n, sample in enumerate(drawn):
            box = tuple(slice(a + 9, b + 9) for a, b in zip(sample.start, sample.stop, strict=True))
            around = [(0, 0), *[(9, 9)] * 3]
            image, label = np.pad(pairs[n][0], around)[(..., *box)], np.pad(pairs[n][1], around[1:])[box]
            image, label = apply(image, label, sample.row, np.zeros((1, 1, 1, 1)), CROP)
            moved = sample.row[0] or kind.scale
            assert np.abs(images[n].cpu().numpy() - image).max() <= (3e-4 if moved else 0 if impl == "fused" else 1e-12)
            assert (labels[n].cpu().numpy() != label).mean() <= (0.01 if sample.row[0] else 0)


def test_a_crop_that_is_not_warped_is_exact() -> None:
    pairs = cases()
    (sample, *_) = samples(KINDS["crop alone"], 3)
    image, label = gathered(volumes(pairs), [sample], "fused")
    box = tuple(slice(a, b) for a, b in zip(sample.start, sample.stop, strict=True))
    assert np.array_equal(image[0].cpu().numpy(), pairs[0][0][(..., *box)].astype(np.float32))
    assert np.array_equal(label[0].cpu().numpy(), pairs[0][1][box])


def test_one_voxel() -> None:
    store = Volumes.pack([(torch.full((1, 1, 1, 1), 7, dtype=torch.uint8), torch.ones(1, 1, 1).byte())], DEVICE)
    row = torch.from_numpy(rows.pack({"flip": [1, 1, 1], "scale": 2, "shift": 1}, 1))[None]
    image, label = augment(store, [0], [((0, 0, 0), (1, 1, 1))], row, rows.layout(1), (1, 1, 1), impl="fused")
    assert image.item() == 15
    assert label.item() == 1


def test_what_one_gather_can_not_do_is_refused() -> None:
    store, (sample, *_) = volumes(cases()), samples(KINDS["flips"], 0)
    row = torch.from_numpy(sample.row.copy())[None]
    box = [(sample.start, sample.stop)]
    for name, value in {"noise": 0.1, "blur": 1.0, "contrast": 0.9, "low": 0.5, "gamma": 2.0}.items():
        other = row.clone()
        other[:, rows.layout(C)[name]] = value
        with pytest.raises(ValueError, match=name):
            augment(store, [0], box, other, rows.layout(C), CROP)
    with pytest.raises(ValueError, match="does not fit"):
        augment(store, [0], [((0, 0, 0), (6, 7, 6))], row, rows.layout(C), CROP)
    with pytest.raises(ValueError, match="does not fit"):  # beside the volume
        augment(store, [0], [((9, 0, 0), (15, 7, 5))], row, rows.layout(C), CROP)
    with pytest.raises(ValueError, match="as many"):
        augment(store, [0, 1], box, row, rows.layout(C), CROP)
    with pytest.raises(ValueError, match="image"):
        Volumes.pack([(torch.zeros(1, 2, 2, 2), torch.zeros(2, 2, 2).byte())], DEVICE)
    pair = (torch.zeros(1, 2, 2, 2).byte(), torch.zeros(2, 2, 2).byte())
    two_channels = (pair[0].repeat(2, 1, 1, 1), pair[1])
    wrong = [([pair], 9, "8 voxels, not 9"), ([pair] * 2, 15, "as many voxels"), ([pair, two_channels], 16, "channels")]
    for pairs, voxels, words in wrong:
        with pytest.raises(ValueError, match=words):
            Volumes.pack(pairs, DEVICE, voxels)


def test_operator_is_registered_as_torch_asks() -> None:
    store = volumes(cases())
    table = torch.tensor([[0, *SIZES[0], 1, 0, 2, 3, 2, 4]])
    parameters = torch.cat([torch.eye(3, 4).reshape(1, 12), torch.ones(1, 3), torch.ones(1, 2 * C)], 1)
    torch.library.opcheck(fused._augment, (store.image, store.label, table, parameters, C, [2, 2, 2]))
