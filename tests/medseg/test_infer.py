"""Sliding window, flips and resampling to the scan's spacing."""

import numpy as np
import pytest
import torch

from medseg import infer
from medseg.recipes import RECIPES


def identity(image: torch.Tensor) -> torch.Tensor:
    return image[:, :3]


@pytest.mark.parametrize("shape", [(32, 32, 32), (40, 33, 51), (20, 24, 31)])
@pytest.mark.parametrize("flips", [False, True])
def test_windows_cover_the_volume_and_flips_are_undone(shape: tuple[int, ...], flips: bool) -> None:
    image = np.random.default_rng(0).standard_normal((4, *shape)).astype(np.float16)
    recipe = RECIPES["brats_segresnet"]().override(["data.crop=32,32,32"])
    probs = infer.region_probs(identity, image, recipe, flips=flips)
    expected = torch.sigmoid(torch.from_numpy(image[:3].astype(np.float32)))
    assert torch.allclose(probs, expected, atol=1e-5)


@pytest.mark.gpu
def test_a_network_on_the_gpu_answers_on_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    image = np.random.default_rng(0).standard_normal((4, 40, 33, 51)).astype(np.float16)
    recipe = RECIPES["brats_segresnet"]().override(["data.crop=32,32,32"])
    probs = infer.region_probs(lambda windows: identity(windows.cuda()), image, recipe)
    assert torch.allclose(probs, torch.sigmoid(torch.from_numpy(image[:3].astype(np.float32))), atol=1e-5)


def test_flips_average_the_logits() -> None:
    def position(image: torch.Tensor) -> torch.Tensor:
        ramp = torch.arange(image.shape[2], dtype=torch.float32)[None, None, :, None, None]
        return ramp.expand(image.shape[0], 3, *image.shape[2:])

    image = np.zeros((4, 16, 16, 16), np.float16)
    recipe = RECIPES["brats_segresnet"]().override(["data.crop=16,16,16", "evaluate.flip_axes=0"])
    probs = infer.region_probs(position, image, recipe, flips=True)
    assert torch.allclose(probs, torch.sigmoid(torch.tensor(7.5)))


def test_to_native_keeps_edges() -> None:
    probs = torch.rand(3, 8, 9, 10)
    np.testing.assert_array_equal(infer.to_native(probs, (8, 9, 10)), probs)
    up = infer.to_native(probs, (16, 18, 20))
    assert up.shape == (3, 16, 18, 20)
    assert up[0, 0, 0, 0] == pytest.approx(probs[0, 0, 0, 0].item())
    assert up.mean() == pytest.approx(probs.mean().item(), abs=1e-3)
