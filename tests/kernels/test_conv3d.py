"""Convolution of few channels: fused against float64, forward and each gradient."""

import pytest
import torch
from kernel_checks import DEVICE, assert_near, double, draw
from torch import nn

from medkernels.conv3d import KernelConv3d, conv3d, fused, refusal
from medkernels.dispatch import FusedUnavailable

LAST = torch.channels_last_3d
# triton's interpreter multiplies the bits of bfloat16 as if they were whole numbers
HALF = [torch.float16] if DEVICE == "cpu" else [torch.bfloat16, torch.float16]
# batch, channels in and out, sides: one voxel, odd, prime, a whole row, a row between two blocks
SHAPES = [
    (1, 16, 16, 1, 1, 1), (2, 16, 16, 2, 3, 5), (1, 16, 32, 3, 2, 64), (1, 32, 16, 1, 2, 67), (1, 32, 32, 2, 1, 17),
    (1, 16, 16, 2, 2, 128), (2, 4, 16, 2, 3, 5), (1, 4, 32, 1, 2, 71), (1, 4, 16, 2, 1, 128),
]  # fmt: skip
POINTS = [(2, 16, 3, 2, 3, 5), (1, 32, 3, 1, 1, 1), (1, 4, 16, 3, 7, 13), (1, 3, 5, 1, 2, 131)]


def case(shape: tuple[int, ...], side: int, dtype: torch.dtype, bias: bool = False):
    """x with channels last, weights in float32, a bias if asked, and a gradient of the output."""
    b, i, o, *sides = shape
    x = draw(b, i, *sides, dtype=dtype).detach().contiguous(memory_format=LAST).requires_grad_()
    weight = draw(o, i, side, side, side, seed=1, std=(i * side**3) ** -0.5)
    dy = draw(b, o, *sides, dtype=dtype, seed=2).detach().contiguous(memory_format=LAST)
    return x, weight, draw(o, seed=3) if bias else None, dy


def compare(x, weight, bias, dy) -> None:
    """Output and all gradients with those of float64, whose weights are rounded as the kernel rounds them."""
    y = conv3d(x, weight, bias, impl="fused")
    assert y.dtype == x.dtype
    few = weight.shape[2] == 1 and weight.shape[0] <= 4
    assert y.is_contiguous(memory_format=torch.contiguous_format if few else LAST)
    given = [t for t in (x, weight, bias) if t is not None]
    found = torch.autograd.grad(y, given, dy)
    rounded = [t.detach().to(x.dtype).double().requires_grad_() for t in given]
    expected = nn.functional.conv3d(*rounded, padding=weight.shape[2] // 2)
    assert_near(y, expected)
    for ours, theirs, t in zip(found, torch.autograd.grad(expected, rounded, dy.double()), given, strict=True):
        assert ours.dtype == t.dtype
        # the gradient of four channels is torch's own, whose float16 sums on a CPU are not in float32
        assert_near(ours, theirs, factor=5 if ours is not found[0] else 10 if x.shape[1] == 4 else 1)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_voxels_a_side_equal_float64(shape, dtype) -> None:
    compare(*case(shape, 3, dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", POINTS, ids=str)
def test_one_voxel_equals_float64(shape, bias, dtype) -> None:
    compare(*case(shape, 1, dtype, bias))


def test_weights_of_any_strides_get_gradients_of_the_same() -> None:
    x, weight, _, dy = case((1, 16, 16, 2, 3, 5), 3, HALF[0])
    turned = weight.detach().contiguous(memory_format=LAST).requires_grad_()
    (plain,) = torch.autograd.grad(conv3d(x, weight, impl="fused"), weight, dy)
    (found,) = torch.autograd.grad(conv3d(x, turned, impl="fused"), turned, dy)
    assert found.stride() == turned.stride()
    assert torch.equal(found, plain)


def test_two_runs_agree_bit_by_bit() -> None:
    x, weight, bias, dy = case((2, 16, 3, 4, 5, 6), 1, HALF[0], bias=True)
    twice = [torch.autograd.grad(conv3d(x, weight, bias, impl="fused"), (x, weight, bias), dy) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


@pytest.mark.parametrize(("channels", "side"), [(16, 3), (3, 1)])
def test_a_gradient_of_either_layout_is_taken(channels, side) -> None:
    x, weight, _, dy = case((2, 16, channels, 2, 3, 5), side, HALF[0])
    y = conv3d(x, weight, impl="fused")
    (first,) = torch.autograd.grad(y, weight, dy.contiguous(), retain_graph=True)
    (last,) = torch.autograd.grad(y, weight, dy)
    assert torch.equal(first, last)


@pytest.mark.parametrize(
    ("shape", "side"), [((1, 16, 16, 2, 1, 3), 3), ((1, 4, 16, 1, 2, 3), 3), ((1, 16, 3, 1, 2, 3), 1)]
)
def test_operators_are_registered_as_torch_asks(shape, side) -> None:
    x, weight, bias, dy = case(shape, side, torch.float16, bias=side == 1)
    # gradcheck of half precision is float64's above
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(fused._forward, (x, weight, bias), test_utils=checks)
    torch.library.opcheck(fused._backward, (dy, x.detach(), weight.detach(), bias, shape[1] != 4), test_utils=checks)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, _, _ = case((1, 16, 16, 2, 3, 5), 3, HALF[0])
    with pytest.raises(ValueError, match="do not fit 16 channels"):
        conv3d(x, weight[:, :8])
    with pytest.raises(ValueError, match="of side 3 or 1"):
        conv3d(x, weight[..., :2])
    for reason, (a, b, c) in {
        "no kernel for torch.float32": (x.float(), weight, None),
        "channels are not last": (x.contiguous(), weight, None),
        "with a bias": (x, weight, draw(16)),
        "16 channels to 8": (x, weight[:8], None),
        "rows of 130 voxels": (x.repeat(1, 1, 1, 1, 26).contiguous(memory_format=LAST), weight, None),
        "1x1x1 is not odd": (x, weight[..., :1, :1, :1], None),
    }.items():
        assert reason in refusal(a, b, c)
        with pytest.raises(FusedUnavailable, match=reason):
            conv3d(a, b, c, impl="fused")
        plain = nn.functional.conv3d(a, b.to(a.dtype), c if c is None else c.to(a.dtype), padding=b.shape[2] // 2)
        assert torch.equal(conv3d(a, b, c), plain)


def test_only_plain_convolutions_are_taken_over() -> None:
    assert all(KernelConv3d.fits(m) for m in (nn.Conv3d(4, 16, 3, padding=1), nn.Conv3d(16, 3, 1)))
    others = [
        nn.Conv3d(4, 16, 3), nn.Conv3d(4, 16, 3, padding=1, stride=2), nn.Conv3d(4, 16, 3, padding=1, groups=2),
        nn.Conv3d(4, 16, 3, padding=2, dilation=2), nn.Conv3d(4, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv3d(4, 16, 3, padding="same"), nn.ConvTranspose3d(4, 4, 1), nn.Conv2d(4, 4, 1),
    ]  # fmt: skip
    assert not any(map(KernelConv3d.fits, others))


@pytest.mark.skipif(DEVICE == "cpu", reason="`auto` takes the kernel on a GPU only")
@pytest.mark.parametrize("channels", [(16, 16, 3), (4, 16, 3), (16, 3, 1)])
def test_the_module_runs_the_kernel_under_autocast(channels) -> None:
    i, o, side = channels
    convolution = KernelConv3d.take_over(
        nn.Conv3d(i, o, side, padding=side // 2, bias=side == 1, device=DEVICE), "auto"
    )
    x = draw(1, i, 48, 48, 48).detach().contiguous(memory_format=LAST)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = convolution(x)
    assert "medkernels" in type(y.grad_fn).__name__
    y.float().sum().backward()
    exact = nn.functional.conv3d(double(x), convolution.weight.double(), double(convolution.bias), padding=side // 2)
    assert float((y.double() - exact).norm() / exact.norm()) < 1e-2
