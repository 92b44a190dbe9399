"""Plan and run a whole sweep: prepare, every member, then ensemble and tables.

`sweep.py brats --data DIR --out DIR` on this machine; a second call goes on where the first ended.
`sweep.py brats --data DIR --out DIR --cluster NAME` submits it to SLURM, `sweep.py --resume DIR` what is missing of it;
`sweep.py follow DIR` waits for its end, `sweep.py cancel DIR` cancels what waits or runs, `status.py DIR` shows it.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from medlaunch import remote
from medlaunch.follow import EVERY_S, follow, show_table
from medlaunch.jobs import FinishJob, TrainJob
from medlaunch.plan import (
    PLAN,
    Request,
    check_early,
    check_keeps,
    check_place,
    make_plan,
    read_plan,
    say_slow,
    write_plan,
)
from medlaunch.report import read_jobs
from medlaunch.tasks import find_sweep, sweep_names
from medslurm import commands
from medslurm.local import follow_locally
from medtrain.errors import UserError, exit_code
from medtrain.files import read_json, write_json
from medtrain.lock import locked
from medtrain.processes import end_on_signals
from medtrain.recipe import Recipe
from medtrain.run_folder import DONE, FAILED, open_run
from medtrain.settings import refuse_replay

EVERY = f"how often to look (default: {EVERY_S:g})"
WITH_RESUME = ("resume", "cluster", "cluster_file", "time", "throttle", "max_gpu_hours", "dry_run", "follow", "every")


def check_here(recipes: Sequence[Recipe], processes: int) -> None:
    """Refuse before anything is prepared what this machine has not."""
    import torch

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise UserError(f"--processes {processes}: this machine shows {torch.cuda.device_count()} GPUs, one a process.")
    if not torch.cuda.is_available() and any(recipe.train.compile == "replay" for recipe in recipes):
        refuse_replay("there is no GPU")
    if not torch.cuda.is_available():
        say_slow(recipes, "there is no GPU here")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of a sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="?", help=f"one of {', '.join(sweep_names())}")
    parser.add_argument("--data", type=Path, help="MSD, nnU-Net or BraTS folder, or folder of images")
    parser.add_argument("--out", type=Path, help="sweep folder; one found there goes on")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field in every recipe"
    )
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="only these of the sweep's models")
    parser.add_argument(
        "--seeds", type=int, default=1, help="members that differ in their random numbers, a recipe (default: 1)"
    )
    parser.add_argument("--folds", type=int, default=0, help="cross-validation with so many folds (default: none)")
    parser.add_argument("--label-map", default="auto", help="of scans (default: auto; see prepare.py)")
    parser.add_argument("--strict", action="store_true", help="stop at a scan or image that can not be used")
    parser.add_argument("--cancers", nargs="+", default=[], metavar="NAME", help="of images: only these (default: all)")
    parser.add_argument(
        "--weights", choices=("equal", "validation"), default="equal", help="of the scans' ensemble (default: equal)"
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that prepare (default: one a CPU)"
    )
    parser.add_argument("--processes", type=int, default=1, help="of a member on a node, one a GPU (default: 1)")
    cluster = parser.add_argument_group("on a cluster")
    cluster.add_argument("--cluster", default="", metavar="NAME", help='of the cluster file; "here" inside a batch job')
    cluster.add_argument(
        "--cluster-file",
        default="",
        metavar="FILE",
        help="default: $MEDTRAIN_CLUSTERS, ~/.config/medtrain/clusters.toml, then /etc/medtrain/clusters.toml",
    )
    cluster.add_argument("--nodes", type=int, default=1, help="nodes that train a member")
    cluster.add_argument("--time", default="", help="wall time of a member (default: the cluster's)")
    cluster.add_argument("--throttle", type=int, default=0, help="members of an array that run at once (default: all)")
    cluster.add_argument("--max-gpu-hours", type=float, help="refuse a plan that may take more")
    cluster.add_argument("--dry-run", action="store_true", help="print the plan and sbatch's scripts, submit nothing")
    cluster.add_argument("--resume", type=Path, metavar="DIR", help="submit what is missing in a sweep folder")
    cluster.add_argument("--follow", action="store_true", help="wait for the end and print the table")
    cluster.add_argument("--every", type=float, default=EVERY_S, metavar="SECONDS", help=EVERY)
    options = parser.parse_args(argv)
    if options.resume and not options.sweep:  # it takes the rest from plan.json
        for name, value in vars(options).items():
            if name not in WITH_RESUME and value != parser.get_default(name):
                told = name.replace("_", "-")
                raise UserError(f"--resume takes what the sweep was submitted with: leave --{told} out, or name the "
                                "sweep and its --data, too, to compare.")  # fmt: skip
    return options


def request_of(options: argparse.Namespace) -> Request:
    """What was typed; its sweep is "" where --resume says all. Raises UserError for what does not go together."""
    for name, least in (("processes", 1), ("nodes", 1), ("throttle", 0), ("workers", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: give at least {least}.")
    if not options.every > 0:
        raise UserError(f"--every {options.every:g}: give seconds above 0.")
    if options.resume and options.sweep and not options.data:
        raise UserError("--resume DIR needs no sweep's name; with one it needs --data, too, to compare.")
    if not options.resume and not (options.sweep and options.data and options.out):
        raise UserError("a sweep needs its name, --data and --out: see --help; or --resume DIR goes on with one.")
    asked = {name: getattr(options, name) for name in (
        "seeds", "folds", "label_map", "strict", "weights", "workers", "processes", "nodes", "cluster", "time",
        "throttle")}  # fmt: skip
    file = str(Path(options.cluster_file).absolute()) if options.cluster_file else ""
    return Request(sweep=options.sweep or "", data=str(options.data.absolute()) if options.data else "",
                   sets=tuple(options.set), models=tuple(options.models), cancers=tuple(options.cancers),
                   cluster_file=file, **asked)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    end_on_signals()
    if words[:1] in (["cancel"], ["follow"]):
        parser = argparse.ArgumentParser(prog=f"sweep.py {words[0]}", description=f"{words[0]} the jobs of a sweep")
        parser.add_argument("sweep", type=Path, help="folder of the sweep")
        if words[0] == "follow":
            parser.add_argument("--every", type=float, default=EVERY_S, metavar="SECONDS", help=EVERY)
        chosen = parser.parse_args(words[1:])
        return remote.cancel(chosen.sweep) if words[0] == "cancel" else follow(chosen.sweep, chosen.every)
    options = parse(words)
    request = request_of(options)
    if options.resume or request.cluster:
        return remote.run(
            options.resume or options.out, request, resume=bool(options.resume), dry_run=options.dry_run,
            max_gpu_hours=options.max_gpu_hours, following=options.follow, every_s=options.every,
        )  # fmt: skip
    for name in ("dry_run", "max_gpu_hours", "follow", "time", "throttle", "cluster_file"):
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')} belongs to a cluster: add --cluster NAME.")
    if request.nodes > 1:
        raise UserError(f"--nodes {request.nodes} belongs to a cluster: add --cluster NAME.")
    with locked(options.out, "running this sweep"):
        _refuse_if_submitted(options.out)
        return run_here(options.out, request)


def _refuse_if_submitted(out: Path) -> None:
    with remote.slurms_words():
        live = commands.live(job.job for job in read_jobs(out))
    if live:
        raise UserError(f"{out} has jobs on the cluster ({min(live)}): wait, cancel them, or give another --out.")


def run_here(out: Path, request: Request) -> int:
    """Prepare, train the members one after the other on this machine, and finish; returns the exit code."""
    check_place(out)
    door = find_sweep(request.sweep)
    recipes = request.recipes()
    check_early(recipes, request)
    check_here(recipes, request.processes)
    door.expand(recipes, door.look(Path(request.data), request.label_map), request.cancers)
    path = door.prepare(Path(request.data), out, recipes, request)
    cache = door.open_cache(path)
    recipes = door.expand(recipes, cache, request.cancers)
    for recipe in recipes:
        door.check(recipe, cache, request.weights)
    planned = make_plan(request, recipes, path.name)
    if (out / PLAN).is_file():
        check_keeps(out, read_plan(out), planned)
    write_plan(out, planned)
    for recipe, member in zip(recipes, planned["members"], strict=True):
        run = out / member["folder"]
        if (run / DONE).exists():
            open_run(recipe, cache, run)
            print(f"{member['folder']} is done already")
            continue
        job = TrainJob(recipe.to_json(), str(out / planned["cache"]), str(run))
        outcome = follow_locally(job, out / "jobs", name=member["folder"], processes=request.processes)
        if not outcome.ok and not (run / FAILED).exists():
            write_json(run / FAILED, {"status": "failed", "reason": outcome.reason})
    finished = follow_locally(FinishJob(str(out), request.weights), out / "jobs", name="finish", processes=1)
    if not finished.ok:
        told = read_json(out / "finish.json") if (out / "finish.json").is_file() else {}
        if told.get("user") and (reason := str(told.get("reason"))) in finished.reason:  # not of an earlier call
            raise UserError(reason)
        raise UserError(f"the final job failed ({finished.reason}): see {finished.log}, then run the same command.")
    show_table(out, planned)
    return 3 if finished.result else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
