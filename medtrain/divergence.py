"""A run whose gradients are no longer finite: what it leaves, and the one step replayed to see which case it is."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medtrain import checkpoint
from medtrain.errors import UserError
from medtrain.files import read_json, write_json
from medtrain.precision import autocast, precision_for
from medtrain.recipe import Recipe
from medtrain.sampling import Stream
from medtrain.task import Task

RECORD, WEIGHTS = "diverged.json", "checkpoint_diverged.pt"


def record(run: Path, recipe: Recipe, task: Task, step: int, skipped: int, world: int,
           content: dict[str, Any]) -> None:  # fmt: skip
    """Write the weights before `step`, and which samples it had, into the run folder."""
    stream = Stream(recipe.train.seed, task.epoch_length(), recipe.train.batch, first_step=step)
    samples = []
    for n in range(recipe.train.batch):
        epoch, index = stream.epoch_and_index(n)
        samples.append({"epoch": epoch, "index": index, "case": _case_of(task, stream, epoch, index)})
    checkpoint.save(run / WEIGHTS, {**content, "step": step})
    write_json(run / RECORD, {
        "step": step, "skipped_steps": skipped, "ranks": world, "samples": samples,
        "command": f"python launch/replay.py {run}",
    })  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample of the replayed step: values of its image that are not finite, the largest finite one, its loss."""

    epoch: int
    index: int
    case: str
    not_finite: int
    largest: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Share:
    """What went through the network at once on one rank, and the norm of its gradients."""

    samples: tuple[Sample, ...]
    norm: float


def replay(run: Path, recipe: Recipe, task: Task, device: torch.device) -> Iterator[Share]:
    """Do the recorded step again, share by share as its ranks had it; raises UserError where nothing is recorded."""
    if not (run / RECORD).is_file():
        raise UserError(f"{run / RECORD} is not there: only a run that ended with lost gradients can be replayed.")
    told = read_json(run / RECORD)
    content = checkpoint.load(run / WEIGHTS)
    model = task.build_model()
    checkpoint.load_model(model, content, run / WEIGHTS)
    model = model.to(device).train()
    shares = recipe.train.accumulate * int(told["ranks"])
    stream = Stream(recipe.train.seed, task.epoch_length(), recipe.train.batch, shares, first_step=int(told["step"]))
    loader = task.loader(stream, device)
    for _ in range(shares):
        yield _share(model, recipe, task, stream, next(loader).to(device), device)


def _case_of(task: Task, stream: Stream, epoch: int, index: int) -> str:
    """Which training case a sample is of; an epoch has equally many of each case."""
    cases = task.split.train
    return cases[stream.sample(epoch, index) * len(cases) // stream.length]


def _share(model: nn.Module, recipe: Recipe, task: Task, stream: Stream, batch: Any, device: torch.device) -> Share:
    precision = precision_for(recipe, device)
    model.zero_grad(set_to_none=True)
    with autocast(precision, device.type):
        outputs = model(batch.inputs).float()
    samples = []
    for n, (epoch, index) in enumerate(batch.key_B2.tolist()):
        one = dataclasses.replace(batch, **{f.name: getattr(batch, f.name)[n : n + 1]
                                            for f in dataclasses.fields(batch)})  # fmt: skip
        image = one.inputs
        finite = torch.isfinite(image)
        with torch.no_grad():
            loss = float(task.loss(outputs[n : n + 1], one))
        largest = float(image[finite].abs().max()) if finite.any() else 0.0
        samples.append(Sample(epoch, index, _case_of(task, stream, epoch, index), int((~finite).sum()), largest, loss))
    task.loss(outputs, batch).backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return Share(tuple(samples), float(norm))
