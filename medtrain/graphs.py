"""Forward and backward passes as CUDA graphs: the host asks for a whole pass at once, rather than for each kernel.

A 3D network has many small kernels; the host takes longer to ask for them than the device to run them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from medtrain.recipe import Recipe
from medtrain.settings import replay_refusal
from medtrain.wording import shown

AFTER = 2  # steps without, which find the fastest convolutions and show how much memory a step takes
SHARE = 0.4  # of the device's memory that a step may take: a graph keeps its own, so evaluation needs its share besides


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
            _tell("a step takes too much memory")
            return
        self.model.forward = self.plain
        try:
            self.graphed, self.like = capture(self.model, inputs), torch.empty_like(inputs, device="meta")
        except Exception as error:  # a network may ask the device, or a library may not be made for it
            _tell(f"{type(error).__name__}: {shown(error, 120)}")
        finally:
            self.model.forward = self


def _tell(reason: str) -> None:
    print(f"note: steps are not replayed as CUDA graphs ({reason})", flush=True)


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


def capture(model: nn.Module, inputs: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """The model's training passes at these inputs as CUDA graphs; its weights and the random state stay as they were.
    Call it under the autocast that training uses. Leaves the graphs as the model's forward pass.
    """
    kind = inputs.device.type
    # weights that autocast rounds have to be rounded anew in every replay
    cast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False)
    with restored(inputs.device), own_thread_only(), cast:
        return torch.cuda.make_graphed_callables(model, (inputs.clone(),)).forward  # type: ignore[union-attr]
