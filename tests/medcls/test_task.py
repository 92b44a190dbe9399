"""The task: which images, how they are split, what the loss is; and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from medcls.audit import HEAD, audit_lines
from medcls.cache import ImageCache
from medcls.duplicates import leaked_paths
from medcls.folders import choose_cancer
from medcls.pipeline import ImageBatch
from medcls.recipes import ClsRecipe, ImageData
from medcls.selection import make_split, select
from medcls.task import ClsTask, class_probs, symmetries
from medtrain.errors import UserError
from medtrain.sampling import Stream

Tiny = Callable[..., ClsRecipe]


def test_a_cancer_is_chosen_by_name(image_cache: Path) -> None:
    cache = ImageCache(image_cache)
    assert choose_cancer(cache, "Oral Cancer") == "Oral Cancer"
    images, targets, names = select(cache, "Oral Cancer")
    assert set(targets.tolist()) == {0, 1}
    assert names == ["oral_normal", "oral_scc"]
    assert {cache.ids[n].split("/")[0] for n in images} == {"Oral Cancer"}
    assert len(select(cache, "every")[0]) == len(cache.ids)
    with pytest.raises(UserError, match="choose Oral Cancer"):
        choose_cancer(cache, "Oral Cancr")
    with pytest.raises(UserError, match="holds Brain Cancer, Oral Cancer"):
        choose_cancer(cache, "")


def test_the_group_split_leaks_nothing_and_the_random_one_does(image_cache: Path) -> None:
    cache = ImageCache(image_cache)
    for cancer in cache.cancers:
        split = make_split(cache, ImageData(cancer=cancer))
        assert leaked_paths(cache, split) == []
        assert split.test
    whole = make_split(cache, ImageData(cancer="every", split="random"))
    assert len(leaked_paths(cache, whole)) >= 1
    lines = audit_lines(cache, [ImageData(cancer="every"), ImageData(cancer="Oral Cancer")])
    assert lines[0] == list(HEAD)
    assert lines[1][:2] == ["every", 100]
    assert lines[1][4] == 0
    assert lines[1][6] == len(leaked_paths(cache, whole))
    assert lines[1][2] > 20


def test_test_images_that_the_first_weights_know_are_counted(
    image_cache: Path, tiny_images: Tiny, tmp_path: Path
) -> None:
    cache, path = ImageCache(image_cache), tmp_path / "checkpoint_best.pt"

    def begun_from(*parts: object, **more: object) -> ClsTask:
        torch.save({"model": {}, "split": dict(zip(("train", "val", "test"), parts, strict=True)), **more}, path)
        return ClsTask(tiny_images(f"model.weights={path}"), cache)

    train, val, test = (list(part) for part in vars(make_split(cache, ImageData(cancer="Oral Cancer"))).values())
    same = begun_from(train, val, test)
    assert same.about()["seen_before"] == 0
    assert same.warnings() == []
    other = begun_from(train[2:], test[:3], val)
    near = dict(zip(cache.ids, cache.near.tolist(), strict=True))
    known = {near[name] for name in test[:3]}
    count = sum(near[name] in known for name in test)
    assert other.about()["seen_before"] == count >= 3
    assert f"was trained or chosen by {count} of {len(test)} test images" in other.warnings()[0]
    # whoever begins from that run begins from what it began with, too
    later = begun_from(train, val, test, seen_before=other.facts()["seen_before"])
    assert later.about()["seen_before"] == count
    assert ClsTask(tiny_images(), cache).facts()["seen_before"] == []


def test_too_few_groups_name_the_class(image_cache: Path) -> None:
    cache = ImageCache(image_cache)
    cache.group = np.where(cache.target == 4, 10_000, cache.group)
    with pytest.raises(UserError, match=r"class oral_scc has 1 groups .* of its own, 3 parts need one each"):
        make_split(cache, ImageData(cancer="Oral Cancer"))


def test_the_loss_is_cross_entropy_of_the_shares(image_cache: Path, tiny_images: Tiny) -> None:
    logits, target = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    mix = torch.tensor([0.7, 0.6, 1.0, 0.9])
    for smoothing in (0.0, 0.1):
        task = ClsTask(tiny_images(f"smoothing={smoothing}"), ImageCache(image_cache))
        batch = ImageBatch(torch.zeros(4, 3, 2, 2), target, mix, torch.zeros(4, 2))
        one_hot = functional.one_hot(target, 2).float()
        soft = mix[:, None] * one_hot + (1 - mix[:, None]) * one_hot[[1, 0, 3, 2]]
        wanted = functional.cross_entropy(logits, soft, label_smoothing=smoothing)
        assert task.loss(logits, batch).item() == pytest.approx(wanted.item(), rel=1e-5)
        plain = ImageBatch(torch.zeros(4, 3, 2, 2), target, torch.ones(4), torch.zeros(4, 2))
        wanted = functional.cross_entropy(logits, target, label_smoothing=smoothing)
        assert task.loss(logits, plain).item() == pytest.approx(wanted.item(), rel=1e-5)


def uneven(image_cache: Path) -> ImageCache:
    """Of oral_normal 12 images are left, of oral_scc 20."""
    cache = ImageCache(image_cache)
    number = cache.classes.index(("Oral Cancer", "oral_normal"))
    gone = np.flatnonzero(cache.target == number)[:8]
    cache.target = cache.target.copy()
    cache.target[gone] = 0  # now of another cancer
    return cache


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_balanced_loss_is_torchs_weighted_cross_entropy(
    smoothing: float, image_cache: Path, tiny_images: Tiny
) -> None:
    task = ClsTask(tiny_images("data.balance=loss", f"smoothing={smoothing}"), uneven(image_cache))
    counts = np.bincount([task._target[case] for case in task.split.train])
    assert counts[0] < counts[1]
    weights = torch.tensor(counts.sum() / (2 * counts)).float()
    assert weights[0] > 1 > weights[1]
    logits, target = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    mix = torch.tensor([0.7, 0.6, 1.0, 0.9, 0.8])
    one_hot = functional.one_hot(target, 2).float()
    soft = mix[:, None] * one_hot + (1 - mix[:, None]) * one_hot[[1, 0, 3, 2, 4]]
    mixing = ImageBatch(torch.zeros(5, 3, 2, 2), target, mix, torch.zeros(5, 2))
    # for soft targets torch divides by the number of images
    wanted = functional.cross_entropy(logits, soft, weights, label_smoothing=smoothing)
    assert task.loss(logits, mixing).item() == pytest.approx(wanted.item(), rel=1e-5)
    plain = ImageBatch(torch.zeros(5, 3, 2, 2), target, torch.ones(5), torch.zeros(5, 2))
    each = functional.cross_entropy(logits, target, weights, label_smoothing=smoothing, reduction="none")
    assert task.loss(logits, plain).item() == pytest.approx(each.mean().item(), rel=1e-5)
    # shares of a batch give the mean of their losses
    halves = [ImageBatch(*(getattr(plain, name)[part] for name in ("image_BCHW", "target_B", "mix_B", "key_B2")))
              for part in (slice(0, 2), slice(2, 4))]  # fmt: skip
    four = ImageBatch(torch.zeros(4, 3, 2, 2), target[:4], torch.ones(4), torch.zeros(4, 2))
    parts = [task.loss(logits[at], half).item() for at, half in zip((slice(0, 2), slice(2, 4)), halves, strict=True)]
    assert np.mean(parts) == pytest.approx(task.loss(logits[:4], four).item(), rel=1e-5)


def test_balance_is_off_by_default_and_is_part_of_the_signature(image_cache: Path, tiny_images: Tiny) -> None:
    assert ClsTask(tiny_images(), uneven(image_cache)).class_weights_K is None
    assert tiny_images("data.balance=loss").signature != tiny_images().signature
    cache = ImageCache(image_cache)
    task = ClsTask(tiny_images(), cache)
    task._target = dict.fromkeys(task._target, 1)
    with pytest.raises(UserError, match="no training image of class oral_normal"):
        task._class_weights()
    with pytest.raises(UserError, match="one of none, loss"):
        tiny_images("data.balance=sampler")


def test_predictions_come_once_and_in_order(image_cache: Path, tiny_images: Tiny) -> None:
    task = ClsTask(tiny_images("evaluate.batch=8"), ImageCache(image_cache))

    def forward(image: torch.Tensor) -> torch.Tensor:
        level = image.mean((1, 2, 3))
        return torch.stack([level, -level], 1)

    cases = task.split.train[:21]
    together = dict(task.predictions(forward, cases, thorough=False))
    assert tuple(together) == cases
    for case in cases[:20:6]:
        ((name, alone),) = task.predictions(forward, [case], thorough=False)
        assert name == case
        assert np.allclose(alone, together[case], atol=1e-6)
    assert list(task.predictions(forward, [], thorough=True)) == []


def test_flips_average_the_eight_symmetries() -> None:
    image = torch.rand(2, 3, 6, 6)
    views = symmetries(image)
    assert len({view.numpy().tobytes() for view in views}) == 8
    corner = torch.zeros(2, 6, 6).index_put((torch.arange(2), torch.tensor(0), torch.tensor(1)), torch.tensor(1.0))

    def forward(image: torch.Tensor) -> torch.Tensor:
        return torch.stack([image[:, 0, 0, 1], image[:, 0, 1, 0]], 1)

    batch = ImageBatch(image * corner[:, None], torch.zeros(2), torch.ones(2), torch.zeros(2, 2))
    for flips, symmetric in ((True, True), (False, False)):
        probs = np.stack(list(class_probs(forward, iter([batch]), 2, flips=flips)))
        assert probs.sum(1) == pytest.approx(1)
        assert np.allclose(probs[:, 0], probs[:, 1]) == symmetric


def test_a_network_that_diverged_is_told() -> None:
    batch = ImageBatch(torch.zeros(2, 3, 4, 4), torch.zeros(2), torch.ones(2), torch.zeros(2, 2))
    with pytest.raises(UserError, match="diverged"):
        list(class_probs(lambda image: torch.full((2, 3), float("nan")), iter([batch]), 2, flips=False))


def test_mixing_refuses_odd_shares_on_several_ranks(image_cache: Path, tiny_images: Tiny) -> None:
    task = ClsTask(tiny_images("augment.mixup=0.3"), ImageCache(image_cache))
    with pytest.raises(UserError, match="so that it is even"):
        next(task.loader(Stream(0, task.epoch_length(), 6, world=2), torch.device("cpu")))


def test_the_loader_mixes_only_when_asked(image_cache: Path, tiny_images: Tiny) -> None:
    cache = ImageCache(image_cache)
    stream = Stream(0, ClsTask(tiny_images(), cache).epoch_length(), 4)
    plain, mixing = (
        next(ClsTask(tiny_images(f"augment.mixup={alpha}"), cache).loader(stream, torch.device("cpu")))
        for alpha in (0, 0.4)
    )
    assert plain.mix_B.tolist() == [1, 1, 1, 1]
    assert (mixing.mix_B < 1).any()
    assert torch.equal(plain.target_B, mixing.target_B)
    assert set(plain.target_B.tolist()) <= {0, 1}  # numbered within the cancer
