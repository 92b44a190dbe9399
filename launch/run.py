"""A run on this rank: train in a run folder, judge the best weights, leave rows and done.json; errors as sentences."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlaunch.tasks import DOORS
from medtrain.errors import Failed, Stopped, UserError, disk_full, out_of_memory
from medtrain.files import write_json
from medtrain.lock import PATIENCE_S, locked
from medtrain.processes import remove_dead_semaphores
from medtrain.recipe import Recipe
from medtrain.run_folder import DONE, ROWS, SPLIT, open_run

if TYPE_CHECKING:
    from medtrain.engine import Engine
    from medtrain.task import Task


def is_rank_0() -> bool:
    """Whether this process may print, also after the process group has ended."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """The run folder is this run's alone inside: rank 0, which writes there, holds its lock. It is taken before the
    ranks meet, so that none waits in a collective for it; raises InUseError that names the holder.
    """
    if is_rank_0():
        with locked(out, "training there", PATIENCE_S):
            yield
    else:
        yield


def run(recipe: Recipe, cache: Path, out: Path, stop: Callable[[], bool] | None = None,
        profile: int = 0) -> dict[str, Any]:  # fmt: skip
    """`train` in a run folder that no other process trains in meanwhile."""
    with held(out):
        return train(recipe, cache, out, stop, profile)


def train(recipe: Recipe, cache: Path, out: Path, stop: Callable[[], bool] | None = None,
          profile: int = 0) -> dict[str, Any]:  # fmt: skip
    """Train `recipe` on this rank and leave the run folder; returns what done.json holds. Goes on where it ended. The
    caller has the folder `held`.

    Raises `Stopped` at the next step once `stop` says so. `profile` steps are recorded by torch's profiler.
    """
    import torch

    from medtrain import distributed
    from medtrain.engine import Engine

    door = DOORS[recipe.task]
    remove_dead_semaphores()
    ranks = distributed.start(recipe.train.timeout_s)
    engine: Engine | None = None
    try:
        opened = door.open_cache(cache)
        task = door.make_task(recipe, opened)
        engine = Engine(recipe, task, out, ranks, stop, profile)
        problem = ""
        if ranks.is_main:
            try:
                open_run(recipe, opened, out)
            except UserError as error:
                problem = str(error)
        problem = distributed.broadcast(problem)  # or the others would wait for rank 0 until a time limit
        if problem:
            raise UserError(problem)
        if ranks.is_main:
            write_json(out / SPLIT, engine.split.__dict__)
            say_start(recipe, engine, torch.get_num_threads())
            for warning in task.warnings():
                print(f"WARNING: {recipe.name}: {warning}", file=sys.stderr, flush=True)
        engine.train()
        engine.load_best()
        done = judge(recipe, engine, task, out)
        distributed.barrier()
    except Stopped:  # on all ranks
        distributed.say_failed()
        distributed.finish()
        raise
    except UserError:
        distributed.say_failed()
        distributed.leave()
        raise
    except Exception as error:
        # no leaving of the group: the others then learn of the end by the end of this process, after its message
        raise explained(error, recipe, ranks.rank, engine.step if engine else 0, door.MEMORY_FIELDS, out) from error
    distributed.finish()
    return done


def judge(recipe: Recipe, engine: "Engine", task: "Task", out: Path) -> dict[str, Any]:
    """The final rows; leaves cases.csv and done.json and returns what the latter holds."""
    from medtrain.results import CaseRow, write_rows

    engine.tracker.beat(engine.step, engine.epoch, phase="evaluate")
    rows: list[CaseRow] = []
    for part, cases in task.judged():
        judged = engine.evaluate(cases, part, thorough=True)
        rows += judged
    scores = task.summary(judged)
    engine.tracker.close(scores)
    done = {
        "status": "done", "recipe": recipe.name, "signature": recipe.signature, "epochs": recipe.train.epochs,
        "steps": engine.total, "cases": len(judged), "part": part, "scores": scores,
        "precision": engine.strategy.precision, **task.about(),
    }  # fmt: skip
    if engine.ranks.is_main:
        write_rows(out / ROWS, rows)
        write_json(out / DONE, done)
    return done


def explained(error: Exception, recipe: Recipe, rank: int, step: int, memory: str, out: Path) -> Exception:
    """The error as a sentence where its cause is memory, the disk or another rank, else itself."""
    from medtrain.distributed import lost_partner, say_failed

    words = lost_partner(error, step)
    if words:
        return Failed(f"rank {rank}: {words}")
    say_failed()
    kind = out_of_memory(error)
    if kind:
        own = f" of rank {rank}" if rank else ""
        return UserError(f"{recipe.name}: the memory of the {kind}{own} is full: lower {memory}, or raise "
                         f"train.accumulate={recipe.train.accumulate}.")  # fmt: skip
    if disk_full(error) and not getattr(error, "filename", None):  # appending, and TensorBoard, name no file
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))
    return error


def say_start(recipe: Recipe, engine: "Engine", threads: int) -> None:
    """One line about what is going to happen."""
    split, ranks = engine.split, engine.ranks
    count = sum(p.numel() for p in engine.strategy.model.parameters())
    where = ranks.device.type if ranks.device.type == "cuda" else f"CPU with {threads} threads"
    print(
        f"{recipe.name}: {count:,} parameters, {len(split.train)} cases to train, {len(split.val)} to validate, "
        f"{engine.total} steps of batch {recipe.train.batch}, {engine.strategy.precision}, "
        f"{ranks.world} process{'es' if ranks.world > 1 else ''} on {where}",
        flush=True,
    )
