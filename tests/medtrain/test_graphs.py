"""Steps replayed as CUDA graphs: when they are, and that they take the same steps."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from medcls.recipes import RECIPES as CLS_RECIPES
from medseg.models import build_model
from medseg.recipes import RECIPES, SegRecipe
from medtrain import graphs as replaying
from medtrain.distributed import Ranks
from medtrain.errors import UserError
from medtrain.graphs import AFTER, Passes, Replay, passes_replayed, refusal, replays
from medtrain.strategies import make_strategy
from medtrain.strategy import inference, one_group

Tiny = Callable[..., SegRecipe]
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ([], ""),
        (["train.accumulate=2"], ""),
        (["train.recompute=true"], "train.recompute is on"),
        (["train.deterministic=true"], "train.deterministic is on"),
        (
            ["train.strategy=deepspeed"],
            "train.strategy=deepspeed holds on to nodes of gradients, which a capture makes anew",
        ),
    ],
)
def test_what_can_not_be_replayed_is_told(settings: list[str], reason: str) -> None:
    recipe, model = RECIPES["brats_segresnet"]().override(settings), nn.Conv3d(4, 3, 1)
    assert refusal(model, recipe, CUDA, 1) == reason


def test_networks_and_machines_that_can_not_be_replayed() -> None:
    recipe, model = RECIPES["brats_segresnet"](), nn.Sequential(nn.Conv3d(4, 3, 1), nn.BatchNorm3d(3))
    assert "running statistics" in refusal(model, recipe, CUDA, 1)
    plain = nn.Conv3d(4, 3, 1)
    assert refusal(plain, recipe, CUDA, 2) == ""
    by_ddp = recipe.override(["train.strategy=ddp"])
    assert "train.strategy=ddp holds" in refusal(plain, by_ddp, CUDA, 2)
    assert refusal(plain, by_ddp, CUDA, 1) == ""
    assert "no GPU" in refusal(plain, recipe, torch.device("cpu"), 1)
    later = CLS_RECIPES["multicancer_densenet201"]().override(["finetune.freeze_epochs=1"])
    assert "released later" in refusal(plain, later, CUDA, 1)
    cpu, asked = Ranks(0, 1, 0, torch.device("cpu")), recipe.override(["train.compile=replay"])
    with pytest.raises(UserError, match=r"replay can not be, as there is no GPU: --set train\.compile=auto"):
        make_strategy(plain, one_group(plain), asked, cpu)


@pytest.mark.parametrize(
    ("how", "tried", "world", "expected"),
    [("auto", True, 1, True), ("auto", True, 8, True), ("auto", False, 1, False), ("off", True, 1, False),
     ("on", True, 1, False), ("replay", False, 1, True)],
)  # fmt: skip
def test_what_is_replayed_by_itself(how: str, tried: bool, world: int, expected: bool) -> None:
    recipe, model = RECIPES["brats_segresnet"]().override([f"train.compile={how}"]), nn.Conv3d(4, 3, 1)
    model.replays = tried
    assert replays(model, recipe, CUDA, world) == expected
    assert not replays(model, recipe.override(["train.compile=auto"]), torch.device("cpu"), world)


class Recorded:
    """Stands in for a graph, and tells how often it ran."""

    def __init__(self, plain: Callable[[torch.Tensor], torch.Tensor]):
        self.plain, self.runs = plain, 0

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return self.plain(inputs)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """What is captured, on a machine without a GPU."""
    made: list[Recorded] = []

    def capture(model: nn.Module, inputs: torch.Tensor) -> Recorded:
        made.append(Recorded(model.forward))
        model.forward = made[-1]  # as torch does
        return made[-1]

    monkeypatch.setattr(replaying, "roomy", lambda device: True)
    monkeypatch.setattr(replaying, "capture", capture)
    return made


def test_a_graph_is_made_after_some_steps_and_serves_its_shape_only(graphs: list[Recorded]) -> None:
    model, inputs = nn.Linear(4, 2), torch.randn(3, 4)
    plain = nn.functional.linear(inputs, model.weight, model.bias)
    Replay(model)
    for step in range(1, AFTER + 4):
        assert torch.equal(model(inputs), plain)
        assert sum(graph.runs for graph in graphs) == max(0, step - AFTER)
    model(torch.randn(5, 4))
    with torch.no_grad():
        model(inputs)
    model.eval()(inputs)
    assert [graph.runs for graph in graphs] == [3]
    assert list(model.state_dict()) == ["weight", "bias"]


def test_a_failure_or_too_little_memory_leaves_the_network_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(model: nn.Module, inputs: torch.Tensor) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replaying, "capture", fails)
    for room, words in (
        (True, "note: steps are not replayed as CUDA graphs (RuntimeError: operation not"),
        (False, "not replayed as CUDA graphs (a step takes too much memory)"),
    ):
        monkeypatch.setattr(replaying, "roomy", lambda device, room=room: room)
        model, inputs = nn.Linear(4, 2), torch.randn(3, 4)
        called = Replay(model)
        for _ in range(AFTER + 3):
            assert torch.equal(model(inputs), nn.functional.linear(inputs, model.weight, model.bias))
        said = capsys.readouterr().out
        assert called.graphed is None
        assert said.count("note:") == 1
        assert words in said


@pytest.mark.parametrize(("how", "expected"), [("auto", True), ("replay", True), ("off", False), ("graphs", False)])
def test_where_prediction_replays_its_passes(how: str, expected: bool) -> None:
    recipe = RECIPES["brats_unetr"]().override([f"train.compile={how}"])
    assert passes_replayed(recipe, CUDA) == expected
    assert not passes_replayed(recipe, torch.device("cpu"))


def captured(monkeypatch: pytest.MonkeyPatch, error: float = 0.0) -> list[torch.Tensor]:
    """What stands in for captured passes was called with; it answers with an error of such a share."""
    given: list[torch.Tensor] = []

    def capture(model: nn.Module, inputs: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        def replay(inputs: torch.Tensor) -> torch.Tensor:
            given.append(inputs)
            return model(inputs) * (1 + error)

        return replay

    monkeypatch.setattr(replaying, "roomy", lambda device: True)
    monkeypatch.setattr(replaying, "capture_pass", capture)
    return given


def test_passes_of_one_shape_are_replayed_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    given, model = captured(monkeypatch), nn.Linear(4, 2)
    passes = Passes(model)
    with torch.inference_mode():
        for count in (3, 1, 3, 1, 3, 1, 3, 1):  # a scan's windows, the last alone
            inputs = torch.randn(count, 4)
            assert torch.equal(passes(inputs), model(inputs))
        assert passes.graphed is not None
        assert passes.like.shape == (3, 4)
        before = len(given)
        passes(torch.randn(1, 4))
        assert len(given) == before
        passes(inputs := torch.randn(3, 4))
    assert given[-1] is inputs
    assert len(given) == before + 1


@pytest.mark.parametrize(("error", "words"), [(0.02, "a replay is 2.0% apart"), (float("nan"), "nan% apart")])
def test_a_replay_that_gives_something_else_is_not_taken(
    error: float, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, model = captured(monkeypatch, error), nn.Linear(4, 2)
    passes = Passes(model)
    with torch.inference_mode():
        for _ in range(AFTER + 4):
            inputs = torch.randn(3, 4)
            assert torch.equal(passes(inputs), model(inputs))
    assert passes.graphed is None
    assert len(given) == 1
    said = capsys.readouterr().out
    assert said.count("note:") == 1
    assert words in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_passes_give_what_the_networks_give() -> None:
    """Networks that share memory, and one that comes when they are gone."""
    small = {
        "brats_segresnet": [],
        "brats_unetr": ["model.hidden=48", "model.mlp=64", "model.heads=4"],
        "brats_dynunet": ["model.filters=8"],
        "brats_swinunetr": ["model.feature=12"],
    }
    for names in (["brats_segresnet", "brats_unetr", "brats_dynunet", "brats_swinunetr"], ["brats_segresnet"]):
        models = {}
        for name in names:
            recipe = RECIPES[name]().override(["data.crop=64,64,64", "model.kernels=auto", *small[name]])
            models[name] = build_model(recipe).to(CUDA, memory_format=torch.channels_last_3d).eval()
        passes = {name: Passes(model) for name, model in models.items()}
        kept = []
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            for _ in range(AFTER + 4):
                image = torch.randn(2, 4, 64, 64, 64, device=CUDA).contiguous(memory_format=torch.channels_last_3d)
                kept += [(passes[name](image), models[name](image)) for name in names]
        for replayed, plain in kept:  # none was written over
            torch.testing.assert_close(replayed, plain, rtol=1e-2, atol=1e-2)
        assert {name: each.graphed is not None for name, each in passes.items()} == dict.fromkeys(names, True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "micros"), [("brats_segresnet", 1), ("brats_segresnet", 3), ("brats_unetr", 1)])
def test_replayed_steps_are_the_same_steps(name: str, micros: int) -> None:
    small = {
        "brats_segresnet": ["model.dropout=0.2"],
        "brats_unetr": ["model.hidden=48", "model.mlp=64", "model.heads=4"],
    }
    found = {}
    for how in ("off", "replay"):
        recipe = RECIPES[name]().override(
            [
                "data.crop=32,32,32",
                "train.precision=bf16",
                f"train.compile={how}",
                f"train.batch={micros}",
                f"train.accumulate={micros}",
                *small[name],
            ]
        )
        torch.manual_seed(0)
        model = build_model(recipe)
        strategy = make_strategy(model, one_group(model), recipe, Ranks(0, 1, 0, CUDA))
        strategy.train_mode()
        losses = []
        for step in range(8):
            torch.manual_seed(step)  # dropout's masks
            for _ in range(micros):
                loss = strategy.forward(torch.randn(1, 4, 32, 32, 32, device=CUDA)).square().mean()
                strategy.backward(loss / micros)
                losses.append(float(loss))
                del loss  # what it holds would keep gradients' nodes of before
            strategy.step(1e-3)
        found[how] = losses
        if how == "replay":
            assert model.forward.graphed is not None
            before = [p.clone() for p in model.parameters()]
            strategy.evaluated().eval()
            with torch.no_grad(), strategy.autocast():
                strategy.evaluated()(torch.randn(1, 4, 32, 32, 32, device=CUDA))
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    torch.testing.assert_close(found["replay"], found["off"], rtol=2e-2, atol=1e-4)
    assert found["off"][-1] < found["off"][0]


class Asks(nn.Module):
    """A network that asks the device in the middle of its forward pass, which no graph can."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv3d(4, 8, 1), nn.Conv3d(8, 3, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """With dropout, whose random state a capture holds."""
        hidden = nn.functional.dropout(self.first(image), 0.5, self.training)
        return self.last(hidden) * (2 if float(hidden.sum()) > 0 else 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_network_that_can_not_be_captured_trains_on(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPES["brats_segresnet"]().override(["train.precision=bf16", "train.compile=replay"])
    model, stream = Asks(), torch.cuda.current_stream()
    strategy = make_strategy(model, one_group(model), recipe, Ranks(0, 1, 0, CUDA))
    strategy.train_mode()
    for _ in range(6):
        loss = strategy.forward(torch.randn(1, 4, 8, 8, 8, device=CUDA)).square().mean()
        strategy.backward(loss)
        assert float(strategy.step(1e-3)) == 0
        del loss
    assert "steps are not replayed" in capsys.readouterr().out
    forward = inference(model, recipe, CUDA)
    for _ in range(6):
        image = torch.randn(1, 4, 8, 8, 8, device=CUDA)
        assert torch.isfinite(forward(image)).all()
    assert "passes are not replayed" in capsys.readouterr().out
    assert torch.cuda.current_stream() == stream


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("backend", "ranks"), [("nccl", 1), ("gloo", 2)])
def test_replayed_ranks_take_the_steps_of_ddp(backend: str, ranks: int) -> None:
    """Ranks share a GPU, which NCCL refuses for more than one."""
    script = Path(__file__).with_name("replayed_on_a_gpu.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run([*command, str(script), backend], capture_output=True, text=True, timeout=600, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["graphs"] == ranks
    assert found["replayed"] == pytest.approx(found["ddp"], rel=2e-2, abs=1e-4)
    assert found["apart"] == 0
    assert found["ddp"][-1] < found["ddp"][0]


def test_torch_still_captures_by_the_name_that_is_replaced_meanwhile() -> None:
    """`own_thread_only` puts another torch.cuda.graph in its place, which make_graphed_callables must look up there."""
    assert "torch.cuda.graph(" in inspect.getsource(torch.cuda.make_graphed_callables)
    plain = torch.cuda.graph
    with replaying.own_thread_only():
        assert torch.cuda.graph.keywords == {"capture_error_mode": "thread_local"}
    assert torch.cuda.graph is plain
