"""Trilinear doubling with a skip: fused against float64, forward and both gradients."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_near, double, draw

from medkernels.upsample_add import fused, upsample_add

SHAPES = [(2, 6, 2, 3, 4), (1, 3, 5, 1, 7), (2, 1, 1, 1, 1), (1, 130, 1, 1, 1), (1, 2, 3, 2, 13)]
CASES = [(layout, dtype) for layout in ("first", "last") for dtype in DTYPES]
CASES += [("mixed", torch.float32), ("strided", torch.float32)]  # these cost a copy


@pytest.mark.parametrize(("layout", "dtype"), CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_equal_float64(shape, layout, dtype) -> None:
    x = draw(*shape, dtype=dtype).detach()
    skip = draw(*shape[:2], *(2 * side for side in shape[2:]), dtype=dtype, seed=1).detach()
    if layout == "strided":
        x, skip = (t.repeat_interleave(2, 2)[:, :, ::2] for t in (x, skip))
    if layout == "last":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    if layout in ("last", "mixed"):
        skip = skip.contiguous(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    skip.requires_grad_()
    y = upsample_add(x, skip, impl="fused")
    dy = draw(*skip.shape, dtype=dtype, seed=2).detach()
    y.backward(dy)
    exact = [double(x), double(skip)]
    y64 = upsample_add(*exact, impl="reference")
    y64.backward(dy.double())
    assert y.dtype == dtype
    assert layout == "strided" or y.stride() == skip.stride()
    assert_near(y, y64)
    assert_near(x.grad, exact[0].grad)
    assert_near(skip.grad, exact[1].grad)


def test_a_constant_stays_and_gradients_add_up_to_what_came() -> None:
    x = torch.full((1, 1, 3, 2, 5), 7.0, requires_grad=True, device=DEVICE)
    skip = torch.zeros(1, 1, 6, 4, 10, device=x.device)
    y = upsample_add(x, skip, impl="fused")
    y.sum().backward()
    assert torch.equal(y, torch.full_like(y, 7))
    assert torch.equal(x.grad, torch.full_like(x, 8))


def test_unlike_dtypes_promote_as_in_torch() -> None:
    x, skip = draw(1, 2, 1, 2, 3, dtype=torch.bfloat16), draw(1, 2, 2, 4, 6, seed=1)
    y = upsample_add(x, skip, impl="fused")
    y.sum().backward()
    assert y.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
    assert_near(y, upsample_add(double(x), double(skip), impl="reference"))


def test_the_gradient_is_the_transposed_matrix_to_the_bit_and_every_time() -> None:
    x, skip = draw(1, 1, 2, 1, 3), torch.zeros(1, 1, 4, 2, 6, device=DEVICE)
    units = torch.eye(6, device=DEVICE).reshape(6, 1, 1, 2, 1, 3)
    matrix = torch.stack([upsample_add(unit, skip, impl="fused").flatten() for unit in units])
    dy = torch.arange(48.0, device=DEVICE).reshape(skip.shape) % 7  # small whole numbers: every product is exact
    for _ in range(2):
        (gradient,) = torch.autograd.grad(upsample_add(x, skip, impl="fused"), x, dy)
        assert torch.equal(gradient.flatten(), matrix @ dy.flatten())


def test_operator_is_registered_as_torch_asks() -> None:
    torch.library.opcheck(fused._forward, (draw(1, 2, 1, 2, 3), draw(1, 2, 2, 4, 6, seed=1)))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="sides doubled"):
        upsample_add(draw(1, 2, 2, 2, 2), draw(1, 2, 4, 4, 5))
    with pytest.raises(RuntimeError, match="float64"):
        upsample_add(double(draw(1, 1, 1, 1, 1)), double(draw(1, 1, 2, 2, 2)), impl="fused")
