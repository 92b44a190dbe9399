"""Plan and run a whole sweep: prepare, every member, then ensemble and tables.

`python launch/sweep.py brats --data DIR --out DIR` on this machine. A second call goes on where the first ended.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medlaunch.jobs import FinishJob, TrainJob
from medlaunch.options import find_recipe
from medlaunch.train import open_run
from medseg.recipes import SWEEPS, SegRecipe
from medslurm.submit import follow_locally
from medtrain.cache import Cache
from medtrain.errors import UserError, exit_code
from medtrain.files import write_json
from medtrain.processes import end_on_signals


def plan(recipes: Sequence[SegRecipe], out: Path, cache: Path) -> dict[str, Any]:
    """The sweep as a value: one folder a member, named by recipe and signature."""
    members = [{"recipe": r.name, "folder": f"{r.name}-{r.signature[:8]}", "signature": r.signature} for r in recipes]
    return {"out": str(out), "cache": cache.name, "members": members}


def prepare(data: Path, out: Path, spacings: set[float], workers: int, label_map: str) -> Path:
    """The sweep's cache, made or found."""
    from medseg.preparation import Preparation, prepare_dataset, report_enhancement

    if len(spacings) > 1:
        raise UserError(f"the members need caches of different spacing {sorted(spacings)} mm: run them as two sweeps.")
    (spacing,) = spacings
    cache = prepare_dataset(data, out / "cache.h5", Preparation(spacing_mm=spacing), workers=workers,
                            label_map=label_map)  # fmt: skip
    report_enhancement(cache)
    return cache


def check(recipes: Sequence[SegRecipe], cache: Path, processes: int, weights: str) -> None:
    """Refuse before anything runs what would fail in every job."""
    import torch

    from medseg.models import build_model
    from medseg.task import SegTask

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise UserError(f"--processes {processes}: this machine shows {torch.cuda.device_count()} GPUs, one a process.")
    if not torch.cuda.is_available() and max(math.prod(r.data.crop) for r in recipes) >= 96**3:
        print("note: there is no GPU here; this size takes weeks on a CPU (see brats_segresnet_2mm)", flush=True)
    for recipe in recipes:
        split = SegTask(recipe, Cache(cache)).split
        if not split.val and not split.test:
            raise UserError(f"{recipe.name} holds out no case to judge by: --set data.val_fraction=0.2.")
        if weights == "validation" and not (split.val and split.test):
            raise UserError("--weights validation needs both val and test cases: --set data.test_fraction=0.2.")
        if recipe.train.batch % (processes * recipe.train.accumulate):
            raise UserError(
                f"{recipe.name} can not share its batch: --set train.batch={processes * recipe.train.accumulate}."
            )
        build_model(recipe)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help=f"one of {', '.join(SWEEPS)}")
    parser.add_argument("--data", type=Path, required=True, help="MSD folder or BraTS case folders")
    parser.add_argument("--out", type=Path, required=True, help="sweep folder; one found there goes on")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override in every recipe")
    parser.add_argument("--label-map", default="auto", help="auto, msd, legacy, brats18 or brats23")
    parser.add_argument("--weights", choices=("equal", "validation"), default="equal", help="of the ensemble")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that prepare")
    parser.add_argument("--processes", type=int, default=1, help="processes that train a member (GPUs of this machine)")
    options = parser.parse_args(argv)
    end_on_signals()
    if options.sweep not in SWEEPS:
        raise UserError(f"there is no sweep {options.sweep!r}: choose {', '.join(SWEEPS)}.")
    if options.processes < 1:
        raise UserError(f"--processes {options.processes}: give at least 1.")
    recipes = [find_recipe(name).override(options.set) for name in SWEEPS[options.sweep]]
    out = options.out
    spacings = {recipe.data.spacing_mm for recipe in recipes}
    cache = prepare(options.data, out, spacings, options.workers, options.label_map)
    check(recipes, cache, options.processes, options.weights)
    planned = plan(recipes, out, cache)
    write_json(out / "plan.json", planned)
    status = _run(planned, recipes, out, options)
    print(f"\n{(out / 'table.md').read_text(encoding='utf-8')}")
    for name, what in (("table.csv", "table"), ("cases.csv", "every case"), ("figures", "pictures")):
        print(f"{what + ':':12} {out / name}")
    print(f"{'curves:':12} tensorboard --logdir {out}")
    return status


def _run(planned: dict[str, Any], recipes: Sequence[SegRecipe], out: Path, options: argparse.Namespace) -> int:
    """Members one after the other, then the final job; 3 where a member is missing."""
    for recipe, member in zip(recipes, planned["members"], strict=True):
        run = out / member["folder"]
        if (run / "done.json").exists():
            open_run(recipe, Cache(out / planned["cache"]), run)
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
