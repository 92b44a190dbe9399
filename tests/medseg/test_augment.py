"""The same row gives the same sample through DALI on the CPU (and the GPU, where there is one) and plain NumPy."""

from pathlib import Path

import numpy as np
import pytest
import torch

from medseg import rows
from medseg.augment import Augment, VolumeSource, apply, draw, noise_field, rotation
from medseg.cache import Cache
from medseg.pipeline import VolumeLoader
from medtrain.sampling import Stream

CROP = (24, 32, 16)
ALL = {
    "flip": 0.5, "rotate": 0.5, "degrees": 30, "zoom": 0.5, "noise": 0.5, "blur": 0.5, "contrast": 0.5,
    "low_resolution": 0.5, "gamma": 0.5,
}  # fmt: skip
# on the CPU the loader's workers warp, on a GPU DALI does; DALI's warp is checked on the CPU too
DEVICES = ["cpu", "cpu, DALI warps", pytest.param("cuda", marks=pytest.mark.gpu)]


def source_of(cache: Path, augment: Augment, crop: tuple[int, int, int] = CROP, **options) -> VolumeSource:
    opened = Cache(cache)
    stream = Stream(seed=5, length=len(opened.ids) * 4, batch=2)
    return VolumeSource(str(cache), tuple(opened.ids), crop, augment, stream, crops_per_case=4, **options)


def loader_of(source: VolumeSource, workers: int = 0, device: str = "cpu") -> VolumeLoader:
    operations = [name for name in source.augment.operations if not (source.warps and name == "warp")]
    return VolumeLoader(source, batch=2, channels=4, crop=source.crop, operations=operations,
                        workers=workers, device=torch.device(device))  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("only", ["none", *ALL, "everything"])
def test_dali_equals_numpy(cache: Path, only: str, device: str) -> None:
    """Largest difference 5e-3 where volumes are warped (float16 between worker and DALI, DALI's float32 coordinates),
    1e-4 else; after gamma, noise and the like the same times their gain, 2e-2; labels differ in at
    most 1 voxel of 1,000 (ties of the nearest neighbour).
    """
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    off = {"flip": 0.0, "scale": 0.0, "shift": 0.0}
    kinds = {"none": off, "everything": ALL}.get(only) or {**off, only: ALL[only]}
    source = source_of(cache, Augment(**kinds), foreground=0.5)
    _check_dali(source, only, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("only", ["none", "flip", "rotate", "everything"])
def test_dali_equals_numpy_where_cases_are_smaller_than_the_crop(cache: Path, only: str, device: str) -> None:
    """On one axis, on two, on all."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    off = {"flip": 0.0, "scale": 0.0, "shift": 0.0}
    kinds = {"none": off, "everything": ALL}.get(only) or {**off, only: ALL[only]}
    for crop in [(64, 16, 24), (64, 72, 16), (64, 72, 64)]:
        source = source_of(cache, Augment(**kinds), crop, foreground=0.5)
        sizes = [Cache(cache).array(case, "label").shape for case in source.cases]
        assert all(any(n < c for n, c in zip(size, crop, strict=True)) for size in sizes)
        _check_dali(source, only, device, batches=2)


def test_a_case_smaller_than_the_crop_lies_in_its_middle(cache: Path) -> None:
    """The same voxels of padding on each side as MONAI's sliding window, whether a crop is to hold tumour or not."""
    crop = (65, 72, 64)
    for foreground in (0.0, 1.0):
        source = source_of(cache, Augment(flip=0, scale=0, shift=0), crop, foreground=foreground, warps=True)
        batch = next(loader_of(source))
        for n, (epoch, index) in enumerate(batch.key_B2.tolist()):
            case = source.draw(epoch, index).case
            for found, name in ((batch.image_BCDHW[n], "image"), (batch.label_BDHW[n], "label")):
                whole = Cache(cache).read(case, name)
                lacks = [c - n for c, n in zip(crop, whole.shape[-3:], strict=True)]
                around = [(0, 0)] * (whole.ndim - 3) + [(lack // 2, lack - lack // 2) for lack in lacks]
                assert np.array_equal(found.numpy(), np.pad(whole, around).astype(found.numpy().dtype))


def _check_dali(source: VolumeSource, only: str, device: str, batches: int = 6) -> None:
    source.warps, crop = device == "cpu", source.crop
    loader, opened = loader_of(source, device=device.partition(",")[0]), Cache(source.cache)
    warps = {"rotate", "zoom", "degrees", "everything"}
    for _ in range(batches):
        batch = next(loader)
        for n, (epoch, index) in enumerate(batch.key_B2.tolist()):
            sample = source.draw(epoch, index)
            image = opened.patch(sample.case, "image", sample.start, sample.stop)
            label = opened.patch(sample.case, "label", sample.start, sample.stop)
            image, label = apply(image, label, sample.row, noise_field(sample, 4, crop), crop)
            difference = np.abs(batch.image_BCDHW[n].cpu().numpy() - image)
            assert difference.max() < (2e-2 if only == "everything" else 5e-3 if only in warps else 1e-4)
            assert (batch.label_BDHW[n].cpu().numpy() != label).mean() <= 1e-3


def test_workers_change_nothing_and_a_late_start_continues(cache: Path) -> None:
    source = source_of(cache, Augment(**ALL))
    alone = loader_of(source)
    first = [next(alone) for _ in range(4)]
    late = source_of(cache, Augment(**ALL))
    late.stream = Stream(seed=5, length=source.stream.length, batch=2, first_step=2)
    spawned = loader_of(late, workers=2)
    for expected in first[2:]:
        found = next(spawned)
        assert torch.equal(found.key_B2, expected.key_B2)
        assert torch.equal(found.image_BCDHW, expected.image_BCDHW)
        assert torch.equal(found.label_BDHW, expected.label_BDHW)


def test_an_epoch_shows_every_case_equally_often(cache: Path) -> None:
    source = source_of(cache, Augment())
    seen = [source.draw(0, k).case for k in range(source.stream.length)]
    assert all(seen.count(case) == 4 for case in source.cases)


def test_foreground_crops_hold_tumour(cache: Path) -> None:
    opened = Cache(cache)
    source = source_of(cache, Augment(), foreground=1.0)
    for k in range(source.stream.length):
        sample = source.draw(0, k)
        assert opened.patch(sample.case, "label", sample.start, sample.stop).any()


def test_one_option_does_not_change_anothers_draws() -> None:
    def flips(augment: Augment) -> np.ndarray:
        sample = draw(np.random.default_rng(0), augment, 4, "a", (40, 40, 40), CROP, None)
        return sample.row[rows.layout(4)["flip"]]

    assert np.array_equal(flips(Augment()), flips(Augment(rotate=1.0, noise=1.0, gamma=1.0)))


def test_rotation_is_a_rotation() -> None:
    turn = rotation([0.1, -0.4, 0.7])
    assert np.allclose(turn @ turn.T, np.eye(3))
    assert np.linalg.det(turn) == pytest.approx(1)
    quarter = rotation([0, 0, np.pi / 2])  # about W: D and H change places
    assert np.allclose(quarter @ [1, 0, 0], [0, 1, 0])


def test_published_ranges() -> None:
    at, lows, highs = rows.layout(4), [], []
    for seed in range(300):
        row = draw(np.random.default_rng(seed), Augment(), 4, "a", (40, 40, 40), CROP, None).row
        lows.append([row[at["scale"]].min(), row[at["shift"]].min()])
        highs.append([row[at["scale"]].max(), row[at["shift"]].max()])
        assert row[at["warp"]] == 0
    assert np.min(lows, 0) == pytest.approx([0.9, -0.1], abs=0.002)
    assert np.max(highs, 0) == pytest.approx([1.1, 0.1], abs=0.002)


def test_operations_follow_the_recipe() -> None:
    assert Augment().operations == ("flip", "intensity")
    assert Augment(flip=0, scale=0, shift=0).operations == ()
    assert set(Augment(**ALL).operations) == set(rows.ORDER)
