"""Group and instance norm with a rectifier: fused against float64, forward and every gradient."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_near, double, draw
from torch import nn

from medkernels.group_norm_relu import GroupNormReLU, fused, group_norm_relu, instance_norm_leaky_relu, whole

# even, odd, prime, one voxel, one channel a group, more channels than a block, and two dimensions
SHAPES = [
    ((2, 16, 4, 6, 8), 8), ((1, 6, 5, 3, 7), 3), ((2, 7, 13, 1, 3), 7), ((2, 8, 1, 1, 1), 2), ((1, 1, 3, 3, 3), 1),
    ((1, 136, 2, 3, 2), 8), ((2, 4, 9, 11), 2),
]  # fmt: skip


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers with channels first, last, and as every second voxel of a larger tensor."""
    last = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    wide = x.detach().repeat_interleave(2, -1)[..., ::2]
    return {
        "first": x.detach(), "last": x.detach().contiguous(memory_format=last), "strided": wide,
    }  # fmt: skip


CASES = [(*case, dtype) for case in SHAPES for dtype in (DTYPES if case in SHAPES[:3] else DTYPES[:1])]


@pytest.fixture(params=["one launch", "chunks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small groups are normalised in one launch; without it they go the way of large ones."""
    monkeypatch.setattr(whole, "SECTOR", 1)
    if request.param == "chunks":
        monkeypatch.setattr(whole, "MOST", 0)
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layout", ["first", "last", "strided"])
@pytest.mark.parametrize(("shape", "groups", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("kind", ["relu", "residual"])
def test_output_and_gradients_equal_float64(shape, groups, dtype, layout, kind) -> None:
    x = layouts(draw(*shape, dtype=dtype, mean=1, std=2))[layout].requires_grad_()
    weight, bias = draw(shape[1], seed=1), draw(shape[1], seed=2)
    residual, slope = (draw(*shape, dtype=dtype, seed=3), 0.01) if kind == "residual" else (None, 0.0)
    # one-voxel groups have no variance: eps decides, so gradients of x grow by 1/sqrt(eps)
    eps = 1e-5 if x[0].numel() // groups > 4 else 1e-1
    dy = draw(*shape, dtype=dtype, seed=4).detach()
    y = group_norm_relu(x, groups, weight, bias, residual=residual, eps=eps, slope=slope, impl="fused")
    y.backward(dy)
    exact = [double(t) for t in (x, weight, bias, residual)]
    y64 = group_norm_relu(exact[0], groups, exact[1], exact[2], residual=exact[3], eps=eps, slope=slope,
                          impl="reference")  # fmt: skip
    y64.backward(dy.double())
    assert y.dtype == dtype
    if layout == "last":
        assert y.stride() == x.stride() == x.grad.stride()
    for found, expected in zip((y, x.grad, weight.grad, bias.grad), (y64, *(t.grad for t in exact[:3])), strict=True):
        assert_near(found, expected, factor=4 if found is weight.grad or found is bias.grad else 1)
    if residual is not None:
        assert_near(residual.grad, exact[3].grad)


@pytest.mark.usefixtures("way")
def test_without_affine_and_as_instance_norm() -> None:
    x, dy = draw(2, 5, 3, 4, 7), draw(2, 5, 3, 4, 7, seed=1).detach()
    exact = double(x)
    y = instance_norm_leaky_relu(x, impl="fused")
    y.backward(dy)
    y64 = nn.functional.leaky_relu(nn.functional.instance_norm(exact), 0.01)
    y64.backward(dy.double())
    assert_near(y, y64)
    assert_near(x.grad, exact.grad)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("last", [False, True])
def test_a_large_mean_costs_no_digits(last: bool) -> None:
    x = draw(1, 8, 6, 7, 5, mean=3000)
    groups = x.detach().cpu().reshape(4, -1)
    naive = groups.square().mean(1) - groups.mean(1).square()  # what sums of x and x * x would give
    assert (naive - groups.var(1)).abs().max() > 0.1
    if last:
        x = x.detach().contiguous(memory_format=torch.channels_last_3d)
    y = group_norm_relu(x, 4, impl="fused")
    assert_near(y, group_norm_relu(double(x), 4, impl="reference"), factor=10)


def test_a_sample_of_many_chunks_is_merged_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "MOST", 0)
    monkeypatch.setattr(fused, "TILE", 16)
    monkeypatch.setattr(fused, "PROGRAMS", 24)
    monkeypatch.setattr(fused, "EACH", 16)
    x, weight, bias = draw(1, 4, 5, 7, 6, mean=3), draw(4, seed=1), draw(4, seed=2)
    block_s, _, chunk, chunks = fused.plan(1, 4, 210, 210)
    assert chunks > 2
    assert chunk > block_s
    assert 210 % chunk
    y = group_norm_relu(x, 2, weight, bias, impl="fused")
    y.sum().backward()
    exact = [double(t) for t in (x, weight, bias)]
    y64 = group_norm_relu(exact[0], 2, *exact[1:], impl="reference")
    y64.sum().backward()
    for found, expected in zip((y, x.grad, weight.grad, bias.grad), (y64, *(t.grad for t in exact)), strict=True):
        assert_near(found, expected, factor=4)


def test_a_group_of_many_tiles_is_summed_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "TILE", 16)
    x, weight, bias = draw(2, 6, 5, 7, 6, mean=3), draw(6, seed=1), draw(6, seed=2)
    assert whole.plan(3, 210)["BLOCK_S"] < 210
    y = group_norm_relu(x, 2, weight, bias, impl="fused")
    y.square().sum().backward()
    exact = [double(t) for t in (x, weight, bias)]
    y64 = group_norm_relu(exact[0], 2, *exact[1:], impl="reference")
    y64.square().sum().backward()
    for found, expected in zip((y, x.grad, weight.grad, bias.grad), (y64, *(t.grad for t in exact)), strict=True):
        assert_near(found, expected, factor=4)


@pytest.mark.usefixtures("way")
def test_runs_agree_bit_by_bit() -> None:
    def run() -> list[torch.Tensor]:
        x, weight, bias = draw(2, 8, 5, 6, 7), draw(8, seed=1), draw(8, seed=2)
        y = group_norm_relu(x, 4, weight, bias, impl="fused")
        y.square().sum().backward()
        return [y, x.grad, weight.grad, bias.grad]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("residual", [False, True])
def test_operator_is_registered_as_torch_asks(residual: bool) -> None:
    x, weight, bias = draw(1, 4, 2, 3, 2), draw(4, seed=1), draw(4, seed=2)
    other = draw(1, 4, 2, 3, 2, seed=3) if residual else None
    torch.library.opcheck(fused._forward, (x, weight, bias, other, 2, 1e-5, 0.01))


def test_module_keeps_the_graph_whole_and_the_state_dict() -> None:
    norm = nn.GroupNorm(2, 4).to(DEVICE)
    made = GroupNormReLU.take_over(norm, impl="fused")
    assert list(made.state_dict()) == list(norm.state_dict())
    assert made.weight is norm.weight
    x = draw(1, 4, 3, 2, 5)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x), torch.relu(norm(x)))


def test_only_small_groups_whose_channels_fill_a_sector_take_one_launch() -> None:
    x = torch.empty(2, 128, 8, 8, 8, dtype=torch.bfloat16)
    assert whole.fits(x, 8, 512)
    assert whole.fits(x, 8, 1)
    assert whole.fits(x, 128, 512)
    assert not whole.fits(x, 128, 1)  # two bytes of each sector
    assert not whole.fits(x, 4, 512)


def test_bad_arguments_are_refused() -> None:
    x = draw(1, 4, 2, 2, 2)
    with pytest.raises(ValueError, match="multiple of 3"):
        group_norm_relu(x, 3)
    with pytest.raises(ValueError, match="weight and bias"):
        group_norm_relu(x, 2, torch.ones(4, device=DEVICE))
    with pytest.raises(ValueError, match="residual"):
        group_norm_relu(x, 2, residual=x[:, :2])
    with pytest.raises(ValueError, match="slope"):
        group_norm_relu(x, 2, slope=-0.1)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    x = torch.zeros(3, 16, 360, 360, 360, dtype=torch.bfloat16, device=DEVICE)
    x[-1, -1] = torch.arange(360, device=DEVICE, dtype=torch.bfloat16)
    y = group_norm_relu(x, 8, impl="fused")
    assert_near(y[-1:, -2:, :1], group_norm_relu(x[-1:, -2:].float(), 1, impl="reference")[:, :, :1], torch.bfloat16)
