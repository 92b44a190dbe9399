"""The engine's whole loop against a step by hand, in one process, step about: both see the same machine."""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medlaunch.tasks import DOORS
from medtrain.distributed import Ranks
from medtrain.engine import Engine
from medtrain.estimate import Example
from medtrain.sampling import Stream
from medtrain.splits import Split

By_hand = Callable[[], None]


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what was asked of it; both sides are measured so."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fresh_peak() -> None:
    """Let a GPU's peak of memory begin now, without what earlier measurements left in cycles or in the allocator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Batch:
    """One batch that stays where it is."""

    def __init__(self, example: Example, device: torch.device):
        self.inputs, self.target = example.inputs.to(device), example.target.to(device)

    def to(self, device: torch.device) -> "Batch":
        """It is there."""
        return self


class OneBatch:
    """A task of one batch, as often as is asked for; while the engine waits for it, the rival takes its step."""

    best_by = "mean"
    split = Split(train=("a",), val=(), test=())

    def __init__(self, example: Example, batch: Batch, rival: By_hand, length: int):
        self.example, self.batch, self.rival, self.length = example, batch, rival, length
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def build_model(self) -> nn.Module:
        """The network."""
        return self.example.model

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """All in one."""
        return [{"params": list(model.parameters()), "lr_scale": 1.0, "frozen_epochs": 0}]

    def loss(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The task's own."""
        return self.example.loss(outputs, batch.target)

    def epoch_length(self) -> int:
        """Samples of all steps together: nothing is validated before."""
        return self.length

    def loader(self, stream: Stream, device: torch.device) -> Iterator[Batch]:
        """The batch; measures the time between two requests, and that of the rival's step in between."""
        ended = 0.0
        while True:
            synchronize(device)
            asked = time.perf_counter()
            if ended:
                self.ours.append(asked - ended)
            self.rival()
            synchronize(device)
            ended = time.perf_counter()
            self.theirs.append(ended - asked)
            yield self.batch

    def facts(self) -> dict[str, Any]:
        """None."""
        return {}


def compare(recipe: Any, ranks: Ranks, by_hand: Callable[[Any, Example, Batch], By_hand], steps: int,
            skip: int = 2) -> tuple[float, float]:  # fmt: skip
    """Median seconds of (our step, the step by hand) over `steps`, less the first `skip`."""
    recipe = recipe.override(["train.epochs=1"])
    door, share = DOORS[recipe.task], recipe.train.batch // ranks.world
    torch.manual_seed(0)
    theirs = door.example(recipe, share, ranks.device)
    torch.manual_seed(0)
    ours = door.example(recipe, share, ranks.device)
    batch = Batch(ours, ranks.device)
    task: Any = OneBatch(ours, batch, by_hand(recipe, theirs, batch), steps * recipe.train.batch)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(recipe, task, Path(folder), ranks)
        engine.train()
    return statistics.median(task.ours[skip:]), statistics.median(task.theirs[skip:])
