"""Plan and run a whole sweep: prepare, every member, then ensemble and tables.

`python launch/sweep.py brats --data DIR --out DIR` on this machine. A second call goes on where the first ended.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from medlaunch.jobs import FinishJob, TrainJob
from medlaunch.options import find_recipe, find_sweep, sweep_names
from medlaunch.train import open_run
from medslurm.submit import follow_locally
from medtrain.errors import UserError, exit_code
from medtrain.files import write_json
from medtrain.processes import end_on_signals
from medtrain.recipe import Recipe


def plan(door: ModuleType, recipes: Sequence[Recipe], cache: Path) -> dict[str, Any]:
    """The sweep as a value: one folder a member, named by recipe and signature."""
    members = [
        {"recipe": r.name, "folder": door.folder(r), "signature": r.signature, "settings": json.loads(r.to_json())}
        for r in recipes
    ]
    return {"task": door.TASK, "cache": cache.name, "members": members}


def check(door: ModuleType, recipes: Sequence[Recipe], cache: Any, processes: int, weights: str) -> None:
    """Refuse before anything runs what would fail in every job."""
    import torch

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise UserError(f"--processes {processes}: this machine shows {torch.cuda.device_count()} GPUs, one a process.")
    for recipe in recipes:
        if recipe.train.batch % (processes * recipe.train.accumulate):
            raise UserError(
                f"{recipe.name} can not share its batch: --set train.batch={processes * recipe.train.accumulate}."
            )
        door.check(recipe, cache, weights)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help=f"one of {', '.join(sweep_names())}")
    parser.add_argument("--data", type=Path, required=True, help="MSD or BraTS folder, or Multi Cancer folder")
    parser.add_argument("--out", type=Path, required=True, help="sweep folder; one found there goes on")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override in every recipe")
    parser.add_argument("--label-map", default="auto", help="of scans: auto, msd, legacy, brats18 or brats23")
    parser.add_argument("--strict", action="store_true", help="stop at an image that can not be read")
    parser.add_argument("--cancers", nargs="+", metavar="NAME", help="of images: only these (default: all)")
    parser.add_argument("--weights", choices=("equal", "validation"), default="equal", help="of the scans' ensemble")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that prepare")
    parser.add_argument("--processes", type=int, default=1, help="processes that train a member (GPUs of this machine)")
    options = parser.parse_args(argv)
    end_on_signals()
    door = find_sweep(options.sweep)
    if options.processes < 1:
        raise UserError(f"--processes {options.processes}: give at least 1.")
    recipes = [find_recipe(name).override(options.set) for name in door.SWEEPS[options.sweep]]
    out = options.out
    door.check_early(recipes)
    path = door.prepare(options.data, out, recipes, options)
    cache = door.open_cache(path)
    recipes = door.expand(recipes, cache, options.cancers)
    check(door, recipes, cache, options.processes, options.weights)
    planned = plan(door, recipes, path)
    write_json(out / "plan.json", planned)
    status = _run(planned, recipes, cache, out, options)
    print(f"\n{(out / 'table.md').read_text(encoding='utf-8')}")
    for name, what in door.OUTPUTS.items():
        print(f"{what + ':':12} {out / name}")
    print(f"{'curves:':12} tensorboard --logdir {out}")
    return status


def _run(planned: dict[str, Any], recipes: Sequence[Recipe], cache: Any, out: Path,
         options: argparse.Namespace) -> int:  # fmt: skip
    """Members one after the other, then the final job; 3 where a member is missing."""
    for recipe, member in zip(recipes, planned["members"], strict=True):
        run = out / member["folder"]
        if (run / "done.json").exists():
            open_run(recipe, cache, run)
            print(f"{member['folder']} is done already")
            continue
        job = TrainJob(recipe.to_json(), str(out / planned["cache"]), str(run))
        outcome = follow_locally(job, out / "jobs", name=member["folder"], processes=options.processes)
        if not outcome.ok and not (run / "failed.json").exists():
            write_json(run / "failed.json", {"status": "failed", "reason": outcome.reason})
    finished = follow_locally(FinishJob(str(out), options.weights), out / "jobs", name="finish", processes=1)
    if not finished.ok:
        raise UserError(f"the final job failed ({finished.reason}): see {finished.log}, then run the same command.")
    return 3 if finished.result else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
