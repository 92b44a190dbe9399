"""What a step will need, told before the first one: a step is traced with tensors that have shapes and no bytes."""

import gc
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from medtrain.distributed import Ranks
from medtrain.graphs import AFTER, replays
from medtrain.precision import autocast, autocasts
from medtrain.recipe import Recipe
from medtrain.replayed import Replayed
from medtrain.strategy import Single, one_group

BATCHES = (2, 4)  # of the two traced steps: memory and work are a constant and a part that grows with the batch
STATES = {"adam": 2, "adamw": 2, "sgd": 1}  # numbers that an optimiser keeps of each weight
UPCAST = (nn.GroupNorm, nn.LayerNorm, nn.Softmax)  # what autocast computes in float32 on a GPU, not on a CPU
CUDA_CONTEXT = 0.6e9  # bytes that a process takes of a GPU before its first tensor; an assumption


@dataclass(frozen=True)
class Example:
    """A step without data: a network in training, a batch of inputs and targets, the loss of float32 outputs and
    targets; whether the network computes activations again in the backward pass.
    """

    model: nn.Module
    inputs: torch.Tensor
    target: torch.Tensor
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    recomputes: bool = False

    def without_bytes(self, mode: FakeTensorMode) -> "Example":
        """The same with tensors that have shapes only; changes the network."""
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    kept = parameter.requires_grad
                    module._parameters[name] = nn.Parameter(mode.from_tensor(parameter.detach()), requires_grad=kept)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else mode.from_tensor(buffer)
        return replace(self, inputs=mode.from_tensor(self.inputs), target=mode.from_tensor(self.target))


Make = Callable[[int], Example]  # from a batch size


@dataclass(frozen=True)
class Place:
    """Where a step is to run: on a GPU or not, in a precision; it is traced on `device`, which may lack the GPU."""

    gpu: bool
    precision: str
    device: torch.device


@dataclass(frozen=True)
class Sizes:
    """What a network and its step take, in bytes, with numbers of four bytes."""

    weights: int  # those that are trained
    frozen: int  # the others, and buffers
    base: float  # beside them while forward and backward run, whatever the batch
    sample: float  # the same, for each sample
    flops: float  # of one sample
    replays: bool = False  # whether steps are replayed on GPUs unless the recipe forbids it

    def working(self, batch: int) -> float:
        """Activations, gradients so far and copies in low precision, at the moment when they are most."""
        return self.base + batch * self.sample


class _Live(TorchDispatchMode):
    """Bytes of the storages that exist, now and at most. Libraries convolve in a layout of their own, so what a
    convolution reads and writes exists twice meanwhile.
    """

    twice = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)

    def __init__(self, network: nn.Module, recomputes: bool) -> None:
        super().__init__()
        self.recomputes = recomputes
        self.now = self.most = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
        self._known = {t.untyped_storage()._cdata: 0 for t in (*network.parameters(), *network.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # small lists of axes that a library makes as tensors and reads back have values
        if func is torch.ops.aten.arange.start or (given and all(type(leaf) is torch.Tensor for leaf in given)):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        if self.recomputes and func in self.twice:
            gc.collect()  # without it tensors without bytes are let go later than real ones
        made = func(*args, **(kwargs or {}))
        new = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        for leaf in new:
            self._count(leaf.untyped_storage())
        if func in self.twice:
            self.most = max(self.most, self.now + sum(leaf.nbytes for leaf in (*given, *new)))
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)


def _upcast(module: nn.Module) -> None:
    """Let a module take float32, as autocast does on a GPU and not on a CPU."""
    module.register_forward_pre_hook(lambda _, inputs: tuple(given.float() for given in inputs))


def sizes_of(make: Make, place: Place) -> Sizes:
    """Trace two steps of different batches. Nothing is computed, and nothing but the network and a batch allocated."""
    gc.freeze()  # what is there need not be looked at again and again
    try:
        (fixed, flops, most), (_, more, larger) = (_traced(make, batch, place) for batch in BATCHES)
        replays = getattr(make(1).model, "replays", False)
    finally:
        gc.unfreeze()
    weights, frozen = fixed
    step = BATCHES[1] - BATCHES[0]
    sample = (larger - most) / step
    return Sizes(weights, frozen, most - weights - frozen - BATCHES[0] * sample, sample, (more - flops) / step, replays)


def _traced(make: Make, batch: int, place: Place) -> tuple[tuple[int, int], float, int]:
    """((bytes that are trained, other bytes of the network), floating-point operations, most bytes at once)."""
    example = make(batch)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    example = example.without_bytes(mode)
    trained = sum(p.nbytes for p in example.model.parameters() if p.requires_grad)
    everything = sum(t.nbytes for t in (*example.model.parameters(), *example.model.buffers()))
    low, device = autocasts(place.precision), place.device.type
    if low and place.gpu and device == "cpu":
        for module in example.model.modules():
            if isinstance(module, UPCAST):
                _upcast(module)
    with mode, _Live(example.model, example.recomputes) as live, FlopCounterMode(display=False) as counter:
        with autocast(place.precision, device):
            outputs = example.model(example.inputs)
        loss = example.loss(outputs.float(), example.target)
        del outputs
        loss.backward()
    return (trained, everything - trained), counter.get_total_flops(), live.most


def memory_of_rank(sizes: Sizes, recipe: Recipe, world: int, batch: int) -> dict[str, float]:
    """Bytes on one of `world` ranks for a micro-batch, by what they are for; "together" is what they sum to.

    ZeRO shares out the optimiser's states (stage 1), the gradients too (2), the weights too (3), as in Rajbhandari et
    al. 2020; its own fp32 copy of a rank's part stands among the states, unless both are in the host's memory.
    """
    train, weights = recipe.train, float(sizes.weights)
    stage = train.zero if train.strategy == "deepspeed" else 0
    states = STATES[recipe.optim.name] * weights
    if stage:
        states = 0.0 if train.offload else (states + weights) / world
    # one process alone gets its gradients while the activations go; else their places are there from the start
    kept = weights / world if stage >= 2 else weights
    alone = world == 1 and train.accumulate == 1 and train.strategy != "deepspeed"
    parts = {
        "weights": sizes.frozen + (weights / world if stage == 3 else weights),
        "optimiser": states,
        "average of weights": weights if recipe.optim.ema else 0.0,
        "gradients": 0.0 if alone else kept,
        "activations": max(sizes.working(batch), weights if alone else 0.0),
    }
    return {**parts, "together": sum(parts.values())}


def largest_batch(sizes: Sizes, recipe: Recipe, world: int, budget: float) -> int:
    """The largest micro-batch of a rank that stays within `budget` bytes; 0 where none does."""
    rest = budget - memory_of_rank(sizes, recipe, world, 1)["together"]
    return 1 + int(rest / sizes.sample) if rest >= 0 else 0


def process_bytes(place: Place) -> float:
    """What the process holds before the first tensor: measured here on a CPU, assumed on a GPU."""
    if place.gpu:
        return CUDA_CONTEXT
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def memory_bytes(device: torch.device) -> float:
    """The memory of this GPU, or of this machine."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    words = Path("/proc/meminfo").read_text(encoding="utf-8").split()
    return float(words[words.index("MemTotal:") + 1]) * 1024


def step_seconds(make: Make, recipe: Recipe, batch: int, device: torch.device, steps: int = 3) -> float:
    """Seconds of an optimiser step on this device alone, without loading: the median of some, after the first."""
    example = make(batch)
    kind = Replayed if replays(example.model, recipe, device, 1) else Single
    strategy = kind(example.model, one_group(example.model), recipe, Ranks(0, 1, 0, device))
    strategy.train_mode()
    inputs, target, times = example.inputs.to(device), example.target.to(device), []
    untimed = 1 + (AFTER if kind is Replayed else 0)  # what follows is as every later step
    for _ in range(steps + untimed):
        began = time.perf_counter()
        strategy.backward(example.loss(strategy.forward(inputs), target))
        float(strategy.step(recipe.optim.lr))  # reading it waits for the device
        times.append(time.perf_counter() - began)
    return sorted(times[untimed:])[steps // 2]
