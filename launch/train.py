"""Train one member: `python launch/train.py RECIPE --cache C.h5 --out RUN`, or the same under torchrun."""

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlaunch.forecast import add_arguments, forecast, refuse_without_plan
from medlaunch.options import DOORS, find_recipe, recipe_names
from medtrain.errors import Failed, Stopped, UserError, disk_full, exit_code, out_of_memory
from medtrain.files import read_json, remove_leftovers, write_json, write_text
from medtrain.lock import PATIENCE_S, locked
from medtrain.processes import end_on_signals, remove_dead_semaphores
from medtrain.recipe import Recipe, differing
from medtrain.wording import listed

if TYPE_CHECKING:
    from medtrain.engine import Engine
    from medtrain.task import Task


@contextlib.contextmanager
def held(out: Path, ticket: str = "") -> Iterator[None]:
    """The run folder is this run's alone inside: rank 0, which writes there, holds its lock. It is taken before the
    ranks meet, so that none waits in a collective for it; raises InUseError that names the holder. `ticket`: see
    `locked`.
    """
    if is_rank_0():
        with locked(out, "training there", PATIENCE_S, ticket):
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
            write_json(out / "split.json", engine.split.__dict__)
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
        raise explained(error, recipe, ranks.rank, engine.step if engine else 0, door.MEMORY, out) from error
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
        write_rows(out / "cases.csv", rows)
        write_json(out / "done.json", done)
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


def open_run(recipe: Recipe, cache: Any, out: Path) -> None:
    """Make the run folder; raises UserError where a run of another recipe or on other data lies there."""
    there, data = out / "recipe.json", out / "cache.json"
    if there.exists():
        other = type(recipe).from_json(there.read_text(encoding="utf-8", errors="replace"), str(there))
        if other.signature != recipe.signature:
            fields = listed(differing(recipe, other))
            raise UserError(
                f"{out} holds a run of another recipe ({fields}): give another --out or remove that folder."
            )
        if read_json(data).get("fingerprint") != cache.fingerprint:
            raise UserError(f"{out} was trained on other data than {cache.path} holds: give another --out.")
    remove_leftovers(out)
    write_json(data, {"path": str(cache.path.resolve()), "fingerprint": cache.fingerprint})
    write_text(there, recipe.to_json())


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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help=f"one of {', '.join(recipe_names())}")
    parser.add_argument("--cache", type=Path, help="HDF5 cache made by launch/prepare.py")
    parser.add_argument("--out", type=Path, help="run folder; a run found there goes on")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field of the recipe"
    )
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="record steps with torch's profiler")
    add_arguments(parser)
    options = parser.parse_args(argv)
    end_on_signals()
    if options.plan:
        forecast(find_recipe(options.recipe).override(options.set), options)
        return 0
    refuse_without_plan(options)
    if options.cache is None or options.out is None:
        parser.error("the following arguments are required: --cache, --out (or --plan)")
    if options.profile < 0:
        raise UserError(f"--profile {options.profile}: give how many steps to record.")
    recipe = find_recipe(options.recipe).override(options.set)
    if (options.out / "done.json").exists() and (options.out / "recipe.json").exists():
        open_run(recipe, DOORS[recipe.task].open_cache(options.cache), options.out)
        print(f"{options.out} is done already")
        return 0
    if not (options.out / "recipe.json").exists():
        DOORS[recipe.task].check_early([recipe])
    done = run(recipe, options.cache, options.out, profile=options.profile)
    scores = ", ".join(f"{name} {value:.3f}" for name, value in done["scores"].items())
    if scores and is_rank_0():
        print(f"{done['cases']} {done['part']} cases, {DOORS[recipe.task].WORDS}: {scores}", flush=True)
    return 0


def is_rank_0() -> bool:
    """Whether this process may print, also after the process group has ended."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(exit_code(main))
