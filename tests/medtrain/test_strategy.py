"""Precision by hardware, clipping, and the optimisers by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medseg.models import build_model
from medseg.recipes import SegRecipe
from medtrain import strategy as strategies
from medtrain.distributed import Ranks
from medtrain.errors import UserError
from medtrain.strategy import Single, make_optimizer, make_strategy, one_group, precision_for

CPU = Ranks(0, 1, 0, torch.device("cpu"))
Tiny = Callable[..., SegRecipe]


def test_precision_is_the_recipes_or_the_hardwares(tiny: Tiny) -> None:
    assert precision_for(tiny("train.precision=fp32"), CPU.device) == "fp32"
    assert precision_for(tiny("train.precision=bf16"), CPU.device) == "bf16"
    has = torch.cpu._is_avx512_bf16_supported()
    assert precision_for(tiny("train.precision=auto"), CPU.device) == ("bf16" if has else "fp32")
    with pytest.raises(UserError, match="needs a GPU"):
        precision_for(tiny("train.precision=fp16"), CPU.device)


def test_a_step_clips_gradients_to_the_norm(tiny: Tiny) -> None:
    model = torch.nn.Linear(4, 1, bias=False)
    before = model.weight.detach().clone()
    recipe = tiny("optim.clip_norm=0.5", "optim.name=sgd", "optim.weight_decay=0", "optim.lr=1")
    strategy = Single(model, one_group(model), recipe, CPU)
    strategy.backward(100 * model(torch.ones(1, 4)).sum())
    strategy.step(1.0)
    # the first Nesterov step moves by (1 + momentum) times the clipped gradient
    moved = (model.weight - before).norm().item()
    assert moved == pytest.approx(0.5 * 1.99, rel=1e-4)
    assert model.weight.grad is None


@pytest.mark.parametrize(("name", "kind"), [("adam", "Adam"), ("adamw", "AdamW"), ("sgd", "SGD")])
def test_optimisers_by_name(tiny: Tiny, name: str, kind: str) -> None:
    optim = tiny(f"optim.name={name}", "optim.lr=0.1").optim
    made = make_optimizer(optim, one_group(torch.nn.Linear(2, 1)), CPU.device)
    assert type(made).__name__ == kind
    assert made.param_groups[0]["lr"] == 0.1


def test_one_process_can_not_be_several(tiny: Tiny) -> None:
    two = Ranks(0, 2, 0, torch.device("cpu"))
    with pytest.raises(UserError, match="2 processes"):
        make_strategy(torch.nn.Linear(1, 1), one_group(torch.nn.Linear(1, 1)), tiny("train.strategy=single"), two)


def test_bf16_autocast_is_on_only_when_asked(tiny: Tiny) -> None:
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        model = torch.nn.Linear(4, 1)
        strategy = Single(model, one_group(model), tiny(f"train.precision={precision}"), CPU)
        with strategy.autocast():
            assert strategy.model(torch.ones(1, 4)).dtype == dtype


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("first", [True, False], ids=["the first step", "a later step"])
def test_a_step_without_finite_gradients_changes_nothing(tiny: Tiny, name: str, first: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    strategy = Single(model, one_group(model), tiny(f"optim.name={name}"), CPU)

    def step(inputs: torch.Tensor) -> float:
        strategy.backward(strategy.wrapped(inputs).square().sum())
        return float(strategy.step(0.01))

    good = torch.arange(8.0).reshape(2, 4).sin()
    if not first:
        assert step(good) == 0
    before = {key: value.clone() for key, value in strategy.model.state_dict().items()}
    assert step(torch.full((2, 4), torch.nan)) == 1
    after = strategy.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if "num_batches" not in key)
    assert step(good) == 0
    assert not torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["1.running_mean"], after["1.running_mean"])
    assert all(torch.isfinite(value).all() for value in after.values())


def test_sgd_starts_as_torchs(tiny: Tiny) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    plain = torch.nn.Linear(4, 1)
    plain.load_state_dict(model.state_dict())
    recipe = tiny("optim.name=sgd", "optim.weight_decay=0.1", "optim.clip_norm=0")
    strategy = Single(model, one_group(model), recipe, CPU)
    theirs = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.99, nesterov=True, weight_decay=0.1, fused=True)
    for n in range(3):
        inputs = torch.full((2, 4), n + 1.0)
        strategy.backward(strategy.wrapped(inputs).sum())
        strategy.step(0.1)
        plain(inputs).sum().backward()
        theirs.step()
        theirs.zero_grad()
    assert torch.equal(model.weight, plain.weight)


def test_channels_last_changes_the_layout_only(tiny: Tiny) -> None:
    recipe = tiny("optim.name=sgd", "optim.clip_norm=0")
    image = torch.randn(1, 4, 32, 32, 32)
    found = []
    for layout in ("false", "true"):
        torch.manual_seed(0)
        model = build_model(recipe)
        strategy = Single(model, one_group(model), recipe.override([f"train.channels_last={layout}"]), CPU)
        seen: list[torch.Tensor] = []
        model.convInit.register_forward_hook(lambda m, i, o, seen=seen: seen.append(i[0]))
        strategy.backward(strategy.forward(image).square().mean())
        strategy.step(0.1)
        found.append((seen[0].is_contiguous(memory_format=torch.channels_last_3d), model.state_dict()))
    assert [last for last, _ in found] == [False, True]
    for a, b in zip(found[0][1].values(), found[1][1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_equals_eager(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    strategy = Single(model, one_group(model), tiny("train.compile=on"), CPU)
    inputs = torch.randn(3, 8)
    torch.testing.assert_close(strategy.forward(inputs), model(inputs))
    assert any(tmp_path.rglob("*.so"))  # what later jobs find


def test_a_compiler_that_fails_is_fallen_back_from_by_choice(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(model: torch.nn.Module) -> Callable[..., torch.Tensor]:
        def call(*inputs: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(strategies, "compiled", broken)
    model = torch.nn.Linear(8, 2)
    inputs = torch.randn(3, 8)
    strategy = Single(model, one_group(model), tiny("train.compile=try"), CPU)
    assert torch.equal(strategy.forward(inputs), model(inputs))
    assert "fails (RuntimeError: no compiler here); the run goes on without" in capsys.readouterr().out
    assert strategy.compiling == "off"  # also for what is wrapped anew
    with pytest.raises(UserError, match=r"no compiler here\): --set train\.compile=try or off"):
        Single(model, one_group(model), tiny("train.compile=on"), CPU).forward(inputs)
