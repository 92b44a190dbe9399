"""Forward and backward passes as CUDA graphs: the host asks for a whole pass at once, rather than for each kernel.

A 3D network has many small kernels; the host takes longer to ask for them than the device to run them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from medtrain.recipe import Recipe
from medtrain.wording import shown

AFTER = 2  # steps without, which find the fastest convolutions and show how much memory a step takes
SHARE = 0.4  # of the device's memory that a step may take: a graph keeps its own, so evaluation needs its share besides


def refusal(
    model: nn.Module, groups: Sequence[dict[str, Any]], recipe: Recipe, device: torch.device, world: int
) -> str:
    """Why steps can not be replayed, or an empty text."""
    train = recipe.train
    if device.type != "cuda":
        return "there is no GPU"
    if world > 1 or train.strategy == "deepspeed":
        return "there are several processes"
    if train.accumulate > 1:  # a graph writes over the memory of the step before, in which gradients are summed up
        return f"{train.accumulate} micro-batches are accumulated"
    if train.recompute or train.deterministic:
        return "train.recompute" if train.recompute else "train.deterministic"
    if any(group["frozen_epochs"] for group in groups):
        return "weights are released later"
    if any(buffer.is_floating_point() for buffer in model.buffers()):
        return "the network has running statistics"
    return ""


class Replay:
    """A network in training whose passes are replayed after some steps, as long as inputs keep their shape."""

    def __init__(self, model: nn.Module):
        self.model, self.steps = model, 0
        self.graphed: Callable[[torch.Tensor], Any] | None = None
        self.like = torch.empty(0)

    def __call__(self, inputs: torch.Tensor) -> Any:
        """The network's outputs."""
        if self.graphed is None:
            self.steps += 1
            if self.steps == AFTER + 1:
                self._capture(inputs)
        if self.graphed is not None and inputs.shape == self.like.shape and inputs.dtype == self.like.dtype:
            return self.graphed(inputs)
        return self.model(inputs)

    def _capture(self, inputs: torch.Tensor) -> None:
        if not roomy(inputs.device):
            return
        try:
            self.graphed, self.like = capture(self.model, inputs), inputs[:0].new_empty(inputs.shape, device="meta")
        except Exception as error:  # a network may ask the device, or a library may not be made for it
            print(
                f"note: steps are not replayed as CUDA graphs ({type(error).__name__}: {shown(error, 120)})", flush=True
            )


def roomy(device: torch.device) -> bool:
    """Whether what a step took at most leaves room for the graph's own memory."""
    return torch.cuda.max_memory_allocated(device) < SHARE * torch.cuda.get_device_properties(device).total_memory


def capture(model: nn.Module, inputs: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """The model's training passes at these inputs as CUDA graphs; the model itself and the random state stay as they
    were. Call it under the autocast that training uses.
    """
    kind, plain = inputs.device.type, model.forward
    state = torch.cuda.get_rng_state(inputs.device)
    try:
        # weights that autocast rounds have to be rounded anew in every replay
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
            return torch.cuda.make_graphed_callables(model, (inputs.clone(),)).forward  # type: ignore[union-attr]
    finally:
        model.forward = plain
        torch.cuda.set_rng_state(state, inputs.device)
