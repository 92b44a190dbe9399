"""Sliding windows added into volumes: fused against float64 and MONAI's inferer."""

import numpy as np
import pytest
import torch
from kernel_checks import DEVICE, assert_near, draw, each_dtype

from medkernels.window_accumulate import fused, reference, window_accumulate
from medseg import infer
from medseg.recipes import RECIPES

STARTS = {
    "one window": ((2, 0, 1),), "all overlap": ((0, 0, 0), (2, 1, 3), (1, 2, 0)), "apart": ((0, 0, 0), (6, 4, 10)),
    "twice the same": ((1, 1, 1), (1, 1, 1)),
}  # fmt: skip
SIZE, SIDE = (11, 7, 13), (5, 3, 3)


def volumes(members: int = 2, regions: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(members, regions, *SIZE, seed=5).detach(), draw(*SIZE, seed=6).detach()


@each_dtype
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_sums_equal_float64(starts, dtype) -> None:
    windows = draw(2, len(starts), 3, *SIDE, dtype=dtype).detach()
    importance = draw(*SIDE, seed=1).detach().abs()
    total, weight = volumes()
    expected = [total.double(), weight.double()]
    window_accumulate(total, weight, windows, starts, importance, impl="fused")
    reference.window_accumulate(*expected, windows.double(), starts, importance.double())
    assert_near(total, expected[0])
    assert_near(weight, expected[1])


def test_one_voxel_strided_windows_and_twice_the_same() -> None:
    windows = draw(1, 3, 2, 1, 1, 2).detach()[..., ::2]
    found = []
    for _ in range(2):
        total, weight = volumes(1, 2)
        window_accumulate(total, weight, windows, [(3, 2, 1)] * 3, torch.ones(1, 1, 1, device=DEVICE), impl="fused")
        found.append(total)
    before, _ = volumes(1, 2)
    assert torch.equal(found[0], found[1])
    assert_near(found[0][0, :, 3, 2, 1], (before[0, :, 3, 2, 1] + windows.sum((1, 3, 4, 5))[0]).double())
    found[0][0, :, 3, 2, 1] = before[0, :, 3, 2, 1]
    assert torch.equal(found[0], before)


def test_operator_is_registered_as_torch_asks() -> None:
    arguments = (*volumes(1, 1), draw(1, 2, 1, *SIDE).detach(), [0, 0, 0, 1, 1, 1], torch.ones(SIDE, device=DEVICE))
    torch.library.opcheck(fused._accumulate, arguments)


@pytest.mark.parametrize("shape", [(20, 17, 25), (10, 12, 15)], ids=["larger", "smaller than the window"])
@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_inference_on_the_device_equals_monais(shape: tuple[int, int, int], kernels: str) -> None:
    """Forward passes that depend on a voxel's place in its window, so that blending matters."""

    def forward(windows: torch.Tensor) -> torch.Tensor:
        ramp = torch.arange(windows.shape[-1], device=windows.device) / 16
        return windows[:, :3] * ramp + windows[:, 1:]

    image = np.random.default_rng(0).standard_normal((4, *shape)).astype(np.float16)
    recipe = RECIPES["brats_segresnet"]().override(
        ["data.crop=16,16,16", "evaluate.overlap=0.3", f"model.kernels={kernels}"]
    )
    members = (forward, lambda windows: -2 * forward(windows))
    found = infer.blended_on_device(members, torch.from_numpy(image).to(DEVICE), recipe)
    assert found.shape == (2, 3, *shape)
    for member, logits in zip(members, found, strict=True):
        expected = infer.blended(member, torch.from_numpy(image.astype(np.float32)), recipe)
        assert_near(logits, expected, factor=2)


def test_what_does_not_fit_is_refused() -> None:
    total, weight = volumes(1, 1)
    windows, importance = draw(1, 1, 1, *SIDE).detach(), torch.ones(SIDE, device=DEVICE)
    with pytest.raises(ValueError, match="starts"):
        window_accumulate(total, weight, windows, [(7, 0, 0)], importance)
    with pytest.raises(ValueError, match="need to be"):
        window_accumulate(total, weight[1:], windows, [(0, 0, 0)], importance)
    with pytest.raises(ValueError, match="float32"):
        window_accumulate(total.double(), weight, windows, [(0, 0, 0)], importance)
