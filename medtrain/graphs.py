"""Forward and backward passes as CUDA graphs: the host asks for a whole pass at once, rather than for each kernel.

A 3D network has many small kernels; the host takes longer to ask for them than the device to run them.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from medtrain.recipe import Recipe
from medtrain.settings import replay_refusal
from medtrain.wording import shown

AFTER = 2  # steps or passes without, which find the fastest convolutions and show how much memory a step takes
APART = 0.01  # of its norm: how far a replayed pass may be from the network's own, some roundings of bf16
SHARE = 0.4  # of the device's memory: a graph keeps a pool of its own, and above it pool and evaluation would not fit


def refusal(model: nn.Module, recipe: Recipe, device: torch.device, world: int) -> str:
    """Why steps can not be replayed, or an empty text."""
    if device.type != "cuda":
        return "there is no GPU"
    if any(buffer.is_floating_point() for buffer in model.buffers()):
        return "the network has running statistics"
    return replay_refusal(recipe, world)


def replays(model: nn.Module, recipe: Recipe, device: torch.device, world: int) -> bool:
    """Whether steps are replayed: where the recipe asks for it, or leaves it open and the network was tried so."""
    wanted = recipe.train.compile
    tried = wanted == "auto" and getattr(model, "replays", False)
    return wanted == "replay" or (tried and not refusal(model, recipe, device, world))


def passes_replayed(recipe: Recipe, device: torch.device) -> bool:
    """Whether prediction replays forward passes: on a GPU, unless the recipe has its network compiled or as it is."""
    return device.type == "cuda" and recipe.train.compile in ("auto", "replay")


class Replay:
    """The forward pass of a network whose training passes are replayed after some steps, as long as inputs keep their
    shape; it takes the place of the network's own, which evaluation goes on to have.
    """

    def __init__(self, model: nn.Module):
        self.model, self.plain, self.steps = model, model.forward, 0
        self.graphed: Callable[[torch.Tensor], Any] | None = None
        self.like = torch.empty(0)
        model.forward = self

    def __call__(self, inputs: torch.Tensor) -> Any:
        """The network's outputs."""
        if not (self.model.training and torch.is_grad_enabled()):
            return self.plain(inputs)
        if self.graphed is None:
            self.steps += 1
            if self.steps == AFTER + 1:
                self._capture(inputs)
        if self.graphed is not None and inputs.shape == self.like.shape and inputs.dtype == self.like.dtype:
            return self.graphed(inputs)
        return self.plain(inputs)

    def _capture(self, inputs: torch.Tensor) -> None:
        if not roomy(inputs.device):
            _tell("steps", "a step takes too much memory")
            return
        self.model.forward = self.plain
        try:
            self.graphed, self.like = capture(self.model, inputs), torch.empty_like(inputs, device="meta")
        except Exception as error:  # a network may ask the device, or a library may not be made for it
            _tell("steps", f"{type(error).__name__}: {shown(error, 120)}")
        finally:
            self.model.forward = self


class Passes:
    """A trained network's forward pass, replayed after some passes of one shape if a replay gives what the network
    itself does. The weights have to stay where they are.
    """

    def __init__(self, model: nn.Module):
        self.model, self.like, self.tried = model, torch.empty(0), False
        self.counted: Counter[torch.Size] = Counter()
        self.graphed: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """The network's output. Call it in inference mode, under the autocast that prediction uses."""
        if self.graphed is not None and inputs.shape == self.like.shape and inputs.dtype == self.like.dtype:
            return self.graphed(inputs)
        outputs: torch.Tensor = self.model(inputs)
        self.counted[inputs.shape] += 1
        if self.counted[inputs.shape] == AFTER + 1 and not self.tried:
            self.tried = True
            self._capture(inputs)
        return outputs

    def _capture(self, inputs: torch.Tensor) -> None:
        if not roomy(inputs.device):
            _tell("passes", "one takes too much memory")
            return
        # others than the captured ones, to see what depends on them
        others = torch.empty_like(inputs).copy_(inputs.flip(-1))
        try:
            graphed = capture_pass(self.model, inputs)
            own = self.model(others).float()
            apart = float(torch.linalg.vector_norm(graphed(others) - own) / torch.linalg.vector_norm(own))
        except Exception as error:  # a network may ask the device, or a library may not be made for it
            _pools.pop(inputs.device, None)  # a capture that failed may have left it unusable
            _tell("passes", f"{type(error).__name__}: {shown(error, 120)}")
            return
        if apart <= APART:
            self.graphed, self.like = graphed, torch.empty_like(inputs, device="meta")
        else:  # also where it is no number
            _tell("passes", f"a replay is {apart:.1%} apart from the network's own pass")


def _tell(what: str, reason: str) -> None:
    print(f"note: {what} are not replayed as CUDA graphs ({reason})", flush=True)


def roomy(device: torch.device) -> bool:
    """Whether what a step took at most leaves room for the graph's own memory."""
    return torch.cuda.max_memory_allocated(device) < SHARE * torch.cuda.get_device_properties(device).total_memory


@contextmanager
def restored(device: torch.device) -> Iterator[None]:
    """Afterwards stream and random state are as before, also where a capture ended midway."""
    generator, stream = torch.cuda.default_generators[device.index or 0], torch.cuda.current_stream(device)
    state = torch.cuda.get_rng_state(device)
    try:
        yield
    except Exception:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(generator.clone_state())  # one that does not take itself for captured
        raise
    finally:
        torch.cuda.set_rng_state(state, device)


@contextmanager
def own_thread_only() -> Iterator[None]:
    """Graphs that are made meanwhile mind this thread only: a loader's threads go on asking the device for memory."""
    plain = torch.cuda.graph
    torch.cuda.graph = partial(plain, capture_error_mode="thread_local")  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        torch.cuda.graph = plain  # type: ignore[misc]


def rounding_anew(kind: str) -> torch.autocast:
    """The autocast that holds, but weights that it rounds are rounded anew in every replay."""
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False)


def capture(model: nn.Module, inputs: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """The model's training passes at these inputs as CUDA graphs; its weights and the random state stay as they were.
    Call it under the autocast that training uses. Leaves the graphs as the model's forward pass.
    """
    with restored(inputs.device), own_thread_only(), rounding_anew(inputs.device.type):
        return torch.cuda.make_graphed_callables(model, (inputs.clone(),)).forward  # type: ignore[union-attr]


# The memory that passes of a device share, as they never run at once, and what has it: it is gone with the last of them
_pools: dict[torch.device, tuple[Any, WeakSet[Any]]] = {}


def capture_pass(model: nn.Module, inputs: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model's forward pass without gradients at these inputs as a CUDA graph."""
    device, graph = inputs.device, torch.cuda.CUDAGraph()
    pool, users = _pools.get(device, (None, WeakSet()))
    if not users:
        pool = torch.cuda.graph_pool_handle()
    fixed = inputs.clone()
    # as above, threads of a loader go on asking the device for memory
    recording = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
    with restored(device), rounding_anew(device.type), recording:
        outputs = model(fixed)

    def replay(inputs: torch.Tensor) -> torch.Tensor:
        fixed.copy_(inputs)
        graph.replay()
        return outputs.clone()  # the next pass overwrites it

    users.add(replay)
    _pools[device] = pool, users
    return replay
