"""Soft Dice of regions from raw codes: fused against float64, MONAI's loss and the project's own."""

import pytest
import torch
from kernel_checks import ABSOLUTE, DEVICE, RELATIVE, assert_near, double, draw, each_dtype
from monai.losses import DiceLoss
from torch.nn import functional

from medkernels.region_dice import fused, region_dice
from medseg.labels import KNOWN, REGIONS
from medseg.losses import region_loss, region_targets

MSD = [KNOWN["msd"].codes(region) for region in REGIONS]
SHAPES = [(2, 4, 6, 8), (1, 5, 3, 7), (3, 1, 1, 1), (2, 13, 1, 11)]


def labels(*shape: int, most: int = 3, seed: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, most + 1, shape, generator=generator, dtype=torch.uint8).to(DEVICE)


def assert_gradient_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """By the table, relative to the largest: gradients of a mean over voxels are as small as these are many."""
    largest = expected.abs().max()
    error = (found.double() - expected).abs().max()
    assert error <= (RELATIVE[found.dtype] + ABSOLUTE[found.dtype]) * largest + 1e-12


@each_dtype
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("squared", "per_sample", "bce"), [(True, True, False), (False, False, True)])
def test_loss_and_gradient_equal_float64(shape, last, dtype, squared, per_sample, bce) -> None:
    logits = draw(shape[0], 3, *shape[1:], dtype=dtype, std=3).detach()
    if last:
        logits = logits.contiguous(memory_format=torch.channels_last_3d)
    label, options = labels(*shape), {"squared": squared, "per_sample": per_sample, "bce": bce, "smooth_nr": 0.1}
    logits.requires_grad_()
    loss = region_dice(logits, label, MSD, **options, impl="fused")
    (3 * loss).backward()
    exact = double(logits)
    expected = region_dice(exact, label, MSD, **options, impl="reference")
    (3 * expected).backward()
    assert loss.dtype == torch.float32
    assert_near(loss, expected)
    assert logits.grad.dtype == dtype
    assert_gradient_near(logits.grad, exact.grad)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_equals_monais_loss(squared: bool, batch: bool, impl: str) -> None:
    logits, label = draw(2, 3, 5, 6, 7, std=2), labels(2, 5, 6, 7)
    loss = region_dice(logits, label, MSD, squared=squared, per_sample=not batch, smooth_nr=1e-5, impl=impl)
    loss.backward()
    other = logits.detach().requires_grad_()
    monai = DiceLoss(sigmoid=True, squared_pred=squared, batch=batch)(other, region_targets(label, KNOWN["msd"]))
    monai.backward()
    assert_near(loss, monai)
    assert_gradient_near(logits.grad, other.grad.double())


@pytest.mark.parametrize("name", list(KNOWN))
@pytest.mark.parametrize("kind", ["dice", "dice_bce"])
def test_the_projects_loss_is_the_same_by_any_kernel(name: str, kind: str) -> None:
    logits, label = draw(2, 3, 4, 5, 6), labels(2, 4, 5, 6, most=4)
    losses = {impl: region_loss(logits, label, KNOWN[name], kind, impl) for impl in ("reference", "fused", "auto")}
    assert_near(losses["fused"], losses["reference"])
    assert_near(losses["auto"], losses["reference"])


@pytest.mark.parametrize("codes", [[0], [3], [200]], ids=["no tumour", "one code", "a code of no region"])
@pytest.mark.parametrize("bce", [False, True])
def test_empty_and_full_regions(codes: list[int], bce: bool) -> None:
    logits = draw(1, 3, 3, 4, 5)
    label = torch.full((1, 3, 4, 5), codes[0], dtype=torch.uint8, device=DEVICE)
    loss = region_dice(logits, label, MSD, bce=bce, impl="fused")
    loss.backward()
    exact = double(logits)
    expected = region_dice(exact, label, MSD, bce=bce, impl="reference")
    expected.backward()
    assert_near(loss, expected)
    assert_gradient_near(logits.grad, exact.grad)


def test_sure_logits_stay_finite() -> None:
    logits = torch.tensor([-200.0, -30, 0, 30, 200, 1e4], device=DEVICE).repeat(1, 3, 1, 1, 1).requires_grad_()
    label = labels(1, 1, 1, 6)
    loss = region_dice(logits, label, MSD, bce=True, impl="fused")
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    truth = region_targets(label, KNOWN["msd"]).double()
    entropy = functional.binary_cross_entropy_with_logits(logits.detach().double(), truth)
    assert_near(loss - region_dice(logits, label, MSD, impl="fused"), entropy, factor=4)


@pytest.mark.parametrize("regions", [[[1]], [[1, 2], [0]], [[1], [2], [3], [30, 4]]])
def test_other_numbers_of_regions(regions: list[list[int]]) -> None:
    logits, label = draw(2, len(regions), 2, 3, 4), labels(2, 2, 3, 4, most=31)
    loss = region_dice(logits, label, regions, bce=True, impl="fused")
    assert_near(loss, region_dice(double(logits), label, regions, bce=True, impl="reference"))


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("shape", [(4, 6, 7), (4, 4, 8), (5, 7, 5)], ids=["ragged", "whole blocks", "odd"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_many_chunks_of_every_number_of_regions(count, shape, last, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "BLOCK_S", 16)
    monkeypatch.setattr(fused, "PROGRAMS", 8 * count)
    logits, label = draw(2, count, *shape).detach(), labels(2, *shape)
    if last:
        logits = logits.contiguous(memory_format=torch.channels_last_3d)
    regions = [*MSD, [0]][:count]
    exact = double(logits.requires_grad_())
    for impl, leaf in (("fused", logits), ("reference", exact)):
        (2 * region_dice(leaf, label, regions, bce=True, impl=impl)).backward()
    assert_near(region_dice(logits, label, regions, bce=True, impl="fused"),
                region_dice(exact, label, regions, bce=True, impl="reference"))  # fmt: skip
    assert_gradient_near(logits.grad, exact.grad)


def test_many_chunks_and_strided_inputs_and_twice_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "BLOCK_S", 16)
    monkeypatch.setattr(fused, "PROGRAMS", 10)
    logits, label = draw(2, 3, 10, 7, 6)[..., ::2], labels(2, 5, 7, 6)[..., ::2].repeat_interleave(2, 1)
    chunk, chunks = fused._plan(2, 210)
    assert chunks > 2
    assert 210 % chunk
    found = []
    for _ in range(2):
        leaf = logits.detach().requires_grad_()
        loss = region_dice(leaf, label, MSD, impl="fused")
        loss.backward()
        found.append((loss, leaf.grad))
    exact = double(logits)
    expected = region_dice(exact, label, MSD, impl="reference")
    expected.backward()
    assert_near(found[0][0], expected)
    assert_gradient_near(found[0][1], exact.grad)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("per_sample", [False, True])
def test_operator_is_registered_as_torch_asks(per_sample: bool) -> None:
    arguments = (draw(1, 3, 2, 3, 2), labels(1, 2, 3, 2), [12, 14, 8, 0], True, per_sample, 0.0, 1e-5, True)
    torch.library.opcheck(fused._forward, arguments)


def test_what_does_not_fit_is_refused() -> None:
    logits, label = draw(1, 3, 2, 2, 2), labels(1, 2, 2, 2)
    with pytest.raises(ValueError, match="do not fit"):
        region_dice(logits, label[:, 1:], MSD)
    with pytest.raises(ValueError, match="regions"):
        region_dice(logits, label, MSD[:2])
    with pytest.raises(RuntimeError, match="not uint8"):
        region_dice(logits, label.long(), MSD, impl="fused")
    with pytest.raises(RuntimeError, match=r"outside 0\.\.30"):
        region_dice(logits, label, [[1], [2], [31]], impl="fused")
