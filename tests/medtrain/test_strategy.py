"""Precision by hardware, clipping, and the optimisers by name."""

import copy
import json
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg.models import build_model
from medseg.recipes import SegRecipe
from medtrain import compilation
from medtrain import strategy as ways
from medtrain.distributed import Ranks
from medtrain.errors import UserError
from medtrain.precision import DTYPES, allow_tf32, autocasts, precision_for
from medtrain.strategies import make_strategy
from medtrain.strategy import Single, make_optimizer, one_group

CPU = Ranks(0, 1, 0, torch.device("cpu"))
Tiny = Callable[..., SegRecipe]


def test_precision_is_the_recipes_or_the_hardwares(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision_for(tiny("train.precision=fp32"), CPU.device) == "fp32"
    assert precision_for(tiny("train.precision=bf16"), CPU.device) == "bf16"
    for capability, has, wanted in (
        ("AVX512", True, "bf16"), ("AVX512", False, "fp32"), ("AVX2", True, "fp32"), ("AVX2", False, "fp32")
    ):  # fmt: skip
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda found=capability: found)
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda found=has: found)
        assert precision_for(tiny("train.precision=auto"), CPU.device) == wanted
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
    for layout in ("off", "on"):
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


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_run_goes_on_in_another_layout_with_its_own_moments(tiny: Tiny, name: str) -> None:
    image, ends = torch.randn(1, 4, 16, 16, 16), {}
    for second in ("off", "on"):
        torch.manual_seed(0)
        state = None
        for layout in ("off", second):
            model = torch.nn.Sequential(torch.nn.Conv3d(4, 8, 3), torch.nn.ReLU(), torch.nn.Conv3d(8, 2, 3))
            recipe = tiny(f"optim.name={name}", f"train.channels_last={layout}", "train.precision=fp32")
            strategy = Single(model, one_group(model), recipe, CPU)
            if state:
                strategy.load(state)
            for _ in range(3):
                strategy.backward(strategy.forward(image).square().mean())
                strategy.step(1e-2)
            state = copy.deepcopy(strategy.state())
        ends[second] = state["model"]
    for a, b in zip(*(end.values() for end in ends.values()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiled_equals_eager(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    strategy = Single(model, one_group(model), tiny("train.compile=on"), CPU)
    inputs = torch.randn(3, 8)
    torch.testing.assert_close(strategy.forward(inputs), model(inputs))
    assert any(tmp_path.rglob("*.so"))  # what later jobs find


@pytest.mark.parametrize("home", ["a folder", "a file"])
def test_what_is_compiled_lies_where_nobody_else_can_put_code(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir() if home == "a folder" else (tmp_path / "home").touch()
    at_exit: list[Callable[[], object]] = []
    monkeypatch.setattr(compilation, "atexit", types.SimpleNamespace(register=lambda *given, **named: at_exit.append(
        partial(*given, **named))))  # fmt: skip
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    torch.compile(torch.nn.Linear(2, 2))  # imports the compiler, which reads its settings
    for before in ("", str(tmp_path / "torchinductor_somebody")):  # an optimiser leaves the latter
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        monkeypatch.delenv("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", raising=False)
        with torch._inductor.config.patch(cpp_cache_precompile_headers=True):
            compilation.compiled(torch.nn.Linear(2, 2))
            assert not torch._inductor.config.cpp_cache_precompile_headers
        assert os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] == "0"
        kept = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        compilation.compiled(torch.nn.Linear(2, 2))
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == kept
        if home == "a folder":
            assert kept == tmp_path / "home" / ".cache" / "medtrain" / "compiled"
            continue
        assert kept.parent == tmp_path
        assert kept.stat().st_mode & 0o777 == 0o700
        at_exit.pop()()
        assert not kept.exists()
    assert at_exit == []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/scratch/torchinductor_mine")
    compilation.compiled(torch.nn.Linear(2, 2))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/scratch/torchinductor_mine"


def test_a_compiler_that_fails_is_fallen_back_from_by_choice(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(model: torch.nn.Module, how: str) -> Callable[..., torch.Tensor]:
        def call(*inputs: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(ways, "compiled", broken)
    model = torch.nn.Linear(8, 2)
    inputs = torch.randn(3, 8)
    strategy = Single(model, one_group(model), tiny("train.compile=try"), CPU)
    assert torch.equal(strategy.forward(inputs), model(inputs))
    assert "fails (RuntimeError: no compiler here); the run goes on without" in capsys.readouterr().out
    assert strategy.compiling == "off"  # also for what is wrapped anew
    with pytest.raises(UserError, match=r"no compiler here\): --set train\.compile=try or off"):
        Single(model, one_group(model), tiny("train.compile=on"), CPU).forward(inputs)


@pytest.fixture
def global_switches() -> Iterator[None]:
    """What torch keeps for the whole process, as it was."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("global_switches")
def test_tf32_is_a_choice_and_never_fp32(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="tf32 needs a GPU"):
        precision_for(tiny("train.precision=tf32"), CPU.device)
    assert precision_for(tiny("train.precision=tf32"), torch.device("cuda")) == "tf32"
    for precision, allowed in (("tf32", True), ("fp32", False), ("bf16", False)):
        allow_tf32(precision)
        assert torch.backends.cudnn.allow_tf32 == allowed
        assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    assert [p for p in DTYPES if autocasts(p)] == ["bf16", "fp16"]


@pytest.mark.usefixtures("global_switches")
def test_a_recipe_of_tf32_predicts_on_a_cpu(tiny: Tiny) -> None:
    model = torch.nn.Linear(4, 1)
    inputs = torch.randn(2, 4)
    assert torch.equal(ways.inference(model, tiny("train.precision=tf32"), CPU.device)(inputs), model(inputs))


def test_the_loss_scale_is_told_in_fp16_only(tiny: Tiny) -> None:
    model = torch.nn.Linear(4, 1)
    strategy = Single(model, one_group(model), tiny(), CPU)
    assert strategy.loss_scale() is None
    strategy.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert strategy.loss_scale() == 1024
    strategy.backward(model(torch.full((1, 4), torch.inf)).sum())
    assert strategy.step(0.1) == 1
    assert strategy.loss_scale() == 512


@pytest.mark.slow
def test_cuda_graphs_are_a_way_to_compile(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    strategy = Single(model, one_group(model), tiny("train.compile=graphs"), CPU)
    inputs = torch.randn(3, 8)
    for _ in range(3):
        torch.testing.assert_close(strategy.forward(inputs), model(inputs))


def test_cuda_graphs_would_write_over_summed_gradients(tiny: Tiny) -> None:
    model = torch.nn.Linear(4, 1)
    with pytest.raises(UserError, match=r"graphs can not accumulate 2 micro-batches: --set train\.compile=on"):
        make_strategy(model, one_group(model), tiny("train.compile=graphs", "train.accumulate=2"), CPU)


class StandIn(torch.optim.Adam):
    """Takes apex's arguments, computes as torch."""

    def __init__(self, params: Any, lr: float, weight_decay: float, adam_w_mode: bool):
        super().__init__(params, lr, weight_decay=weight_decay, decoupled_weight_decay=adam_w_mode)

    def zero_grad(self) -> None:  # type: ignore[override]
        raise AssertionError("apex's FusedAdam takes no set_to_none")


def apex(monkeypatch: pytest.MonkeyPatch, **parts: Any) -> None:
    """Put a package apex with these attributes and optimisers into the place of the real one."""
    package = types.ModuleType("apex")
    monkeypatch.setitem(sys.modules, "apex", package)
    optimizers = parts.pop("optimizers", None)
    vars(package).update(parts)
    if optimizers:
        module = types.ModuleType("apex.optimizers")
        vars(module).update(optimizers)
        monkeypatch.setitem(sys.modules, "apex.optimizers", module)


def test_apex_is_taken_where_asked_for(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    apex(monkeypatch, optimizers={"FusedAdam": StandIn, "FusedSGD": None})
    monkeypatch.setattr(ways, "make_optimizer", lambda o, g, d: make_optimizer(o, g, torch.device("cuda")))
    weights = []
    for library in ("torch", "apex"):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        recipe = tiny(f"optim.library={library}", "optim.name=adamw", "optim.weight_decay=0.1")
        strategy = Single(model, one_group(model), recipe, CPU)
        assert isinstance(strategy.optimizer, StandIn) == (library == "apex")
        for inputs in (torch.ones(1, 4), torch.full((1, 4), torch.nan), -torch.ones(1, 4)):
            strategy.backward(model(inputs).square().sum())
            lost = strategy.step(0.1)
            assert lost == inputs.isnan().any()
        weights.append(model.weight.detach())
        left = strategy.state()
    torch.testing.assert_close(*weights)
    other = Single(model, one_group(model), tiny(), CPU)
    with pytest.raises(UserError, match=r"begun with optim.library=apex: --set optim.library=apex"):
        other.load(left)


def test_apex_that_is_not_there_or_anothers_is_told(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    optim, groups, gpu = tiny("optim.library=apex").optim, one_group(torch.nn.Linear(2, 1)), torch.device("cuda")
    with pytest.raises(UserError, match="needs a GPU"):
        make_optimizer(optim, groups, CPU.device)
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match=r"needs NVIDIA's apex \(https"):
        make_optimizer(optim, groups, gpu)
    apex(monkeypatch)
    with pytest.raises(UserError, match=r"another one of that name \(from PyPI\)"):
        make_optimizer(optim, groups, gpu)
    apex(monkeypatch, amp=None)
    with pytest.raises(UserError, match="without its CUDA extensions"):
        make_optimizer(optim, groups, gpu)


COMPILED = """
import json, sys, torch
from medseg.recipes import RECIPES
from medtrain import distributed
from medtrain.strategies import make_strategy
from medtrain.strategy import one_group
ranks, found = distributed.start(120), []
for how in ("off", "on"):
    recipe = RECIPES["brats_segresnet_demo"]().override(
        ["train.strategy=ddp", "train.precision=fp32", "train.batch=2", f"train.compile={how}", "optim.name=sgd"])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    strategy = make_strategy(model, one_group(model), recipe, ranks)
    inputs = torch.arange(128.0).reshape(2, 64).sin() + ranks.rank
    for _ in range(3):
        strategy.backward(strategy.forward(inputs).square().mean())
        strategy.step(0.001)
    found.append([strategy.called is not strategy.wrapped, model[0].weight.sum().item(), model[2].weight.sum().item()])
if ranks.is_main:
    print(json.dumps(found), flush=True)
distributed.finish()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_compiled_ranks_take_the_same_steps(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(COMPILED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "made")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (off, *a), (on, *b) = json.loads(done.stdout.splitlines()[-1])
    assert (off, on) == (False, True)
    assert a == pytest.approx(b, rel=1e-5)
