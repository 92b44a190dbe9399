"""Images through DALI equal Pillow and NumPy; every sample is a pure function of seed, epoch and index."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medcls import rows
from medcls.augment import Augment, ImageSource, WholeImages, apply, draw, whole
from medcls.cache import ImageCache
from medcls.pipeline import ImageBatch, ImageLoader
from medcls.task import mixed, partners
from medtrain.sampling import Stream, generator

PLAIN = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
FULL = Augment(scale=(0.4, 1), turn=0.5, angle=0.5, brightness=0.3, contrast=0.3, saturation=0.5, mixup=0.2)
CASES = {
    # augmentation, mean difference in grey levels of 255 that is allowed
    "whole": (PLAIN, 0.3),
    "crop and flip": (Augment(), 0.3),
    "turn": (Augment(turn=0.5), 0.3),
    "angle": (Augment(angle=1.0), 2.0),  # the two draw the border between image and black differently
    "colour": (Augment(brightness=0.3, contrast=0.3, saturation=0.5), 0.5),
    "full": (FULL, 2.0),
}


def source_of(path: Path, augment: Augment, stream: Stream, size: int = 0) -> ImageSource:
    cache = ImageCache(path)
    return ImageSource(str(path), np.arange(len(cache.ids)), cache.target.astype(np.int64), augment, stream, size)


def loader_of(source: ImageSource, **options: object) -> ImageLoader:
    chosen = {"batch": 4, "size": 48, "operations": source.augment.operations, "mean": (0,) * 3, "std": (1 / 255,) * 3,
              "workers": 0, "decoded": bool(source.size), **options}  # fmt: skip
    return ImageLoader(source, **chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize(("device", "size"), [("cpu", 48), ("cpu", 0), pytest.param("cuda", 0, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CASES)
def test_workers_and_dali_equal_pillow_and_numpy(image_cache: Path, name: str, device: str, size: int) -> None:
    # size: the source decodes; 0: DALI does
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    augment, tolerance = CASES[name]
    tolerance += 1.5 if device == "cuda" else 0  # nvJPEG rounds differently
    cache = ImageCache(image_cache)
    source = source_of(image_cache, augment, Stream(3, len(cache.ids), 4), size)
    loader = loader_of(source, device=torch.device(device))
    for _ in range(4):
        batch = next(loader)
        for n in range(4):
            place, row = source.draw(*batch.key_B2[n].tolist())
            image = np.array(Image.open(io.BytesIO(cache.encoded(place).tobytes())).convert("RGB"))
            found = batch.image_BCHW[n].permute(1, 2, 0).cpu().numpy()
            assert np.abs(found - apply(image, row, 48)).mean() < tolerance
            assert batch.target_B[n] == cache.target[place]
            assert batch.mix_B[n] == row[rows.layout()["mix"]][0]


def test_evaluation_sees_every_image_whole_and_in_order(image_cache: Path) -> None:
    cache = ImageCache(image_cache)
    chosen = [9, 3, 40]
    source = WholeImages(3, lambda n: (cache.encoded(chosen[n]), cache.size[chosen[n]]), lambda n: str(chosen[n]))
    loader = ImageLoader(source, batch=2, size=48, operations=(), mean=(0,) * 3, std=(1 / 255,) * 3, workers=0)
    found = torch.cat([next(loader).image_BCHW for _ in range(2)])
    for n, number in enumerate([*chosen, chosen[0]]):  # and from the beginning again
        image = np.array(Image.open(io.BytesIO(cache.encoded(number).tobytes())).convert("RGB"))
        expected = apply(image, whole(image.shape[:2]), 48)
        assert np.abs(found[n].permute(1, 2, 0).numpy() - expected).mean() < 0.3
        assert source.case_at(n) == str(number)


@pytest.mark.distributed
def test_workers_and_ranks_change_no_sample(image_cache: Path) -> None:
    alone = loader_of(source_of(image_cache, FULL, Stream(1, 100, 8), 48), batch=8)
    first = next(alone)
    for rank in range(2):
        source = source_of(image_cache, FULL, Stream(1, 100, 8, world=2, rank=rank), 48)
        half = next(loader_of(source, batch=4, workers=1))
        part = slice(4 * rank, 4 * rank + 4)
        assert torch.equal(half.key_B2, first.key_B2[part])
        assert torch.equal(half.image_BCHW, first.image_BCHW[part])
        # pairs lie on one rank, so mixing is the same too
        assert torch.allclose(mixed(half).image_BCHW, mixed(first).image_BCHW[part])


def test_a_draw_is_a_pure_function_and_options_do_not_disturb_each_other() -> None:
    at = rows.layout()
    one, two = (draw(generator(0, 1, 2), FULL, (300, 200)) for _ in range(2))
    assert np.array_equal(one, two)
    plainer = draw(generator(0, 1, 2), Augment(scale=(0.4, 1)), (300, 200))
    assert np.array_equal(one[at["roi"]], plainer[at["roi"]])
    assert np.array_equal(one[at["flip"]], plainer[at["flip"]])
    assert not np.array_equal(one, draw(generator(0, 1, 3), FULL, (300, 200)))


def test_crops_lie_in_the_image_and_have_the_wanted_area() -> None:
    at = rows.layout()["roi"]
    shares = []
    for n in range(500):
        height, width = (1, 1) if n == 0 else (1 + n % 37, 1 + (7 * n) % 53) if n < 50 else (400, 300)
        top, left, h, w = draw(generator(0, 0, n), FULL, (height, width))[at]
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert min(h, w) >= 1
        if n >= 50:
            shares.append(h * w / (height * width))
    assert 0.33 < min(shares) < max(shares) <= 1.0
    assert draw(generator(0, 0, 1), PLAIN, (123, 77))[at].tolist() == [0, 0, 123, 77]


def test_mixing_pairs_neighbours() -> None:
    assert partners(5).tolist() == [1, 0, 3, 2, 4]
    assert partners(1).tolist() == [0]
    image = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
    batch = ImageBatch(image, torch.tensor([0, 1, 2]), torch.tensor([0.75, 0.5, 0.6]), torch.zeros(3, 2))
    assert mixed(batch).image_BCHW[:, 0, 0, 0].tolist() == pytest.approx([0.25, 0.5, 2.0])
    shares = [draw(generator(0, 0, n), FULL, (10, 10))[rows.layout()["mix"]][0] for n in range(400)]
    assert min(shares) >= 0.5
    assert 0.8 < np.mean(shares) < 0.98
    assert draw(generator(0, 0, 0), PLAIN, (10, 10))[rows.layout()["mix"]][0] == 1
