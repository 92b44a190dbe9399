"""The jobs of a sweep: one that prepares, an array for each recipe, a final one after all of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medlaunch.jobs import FinishJob, PrepareJob, TrainJob
from medlaunch.plan import read_request, say_slow, slow_without_gpu
from medlaunch.tasks import DOORS
from medslurm import submit
from medslurm.cluster import HERE, Cluster, minutes
from medslurm.submit import Array
from medtrain.errors import UserError
from medtrain.recipe import Recipe
from medtrain.settings import refuse_replay
from medtrain.tables import to_markdown

HEAD = ("job", "tasks", "at once", "nodes", "processes", "GPUs", "wall time", "GPU-hours", "starts after")


@dataclass(frozen=True)
class Jobs:
    """What is to be submitted: `arrays` hold the members' TrainJobs."""

    cluster: Cluster
    prepare: Array | None
    arrays: Sequence[Array]
    finish: Array

    @property
    def all(self) -> list[Array]:
        """In the order of submission."""
        return [*([self.prepare] if self.prepare else []), *self.arrays, self.finish]

    @property
    def gpu_hours(self) -> float:
        """At most, if nothing is requeued."""
        return sum(array.gpu_hours(self.cluster) for array in self.all)


def make_jobs(out: Path, plan: dict[str, Any], recipes: Sequence[Recipe], missing: set[str], cluster: Cluster,
              prepare: bool) -> Jobs:  # fmt: skip
    """The jobs that are needed for the missing members."""
    request = read_request(plan)
    if not cluster.gpus_per_node and any(recipe.train.compile == "replay" for recipe in recipes):
        refuse_replay(f"nodes of {cluster.name} have no GPU")
    if not cluster.gpus_per_node:
        _check_slow(recipes, cluster)
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in out.name)[:40] or "sweep"
    arrays = []
    time_s = 60 * (minutes(cluster.time) or 0)
    for recipe_name in dict.fromkeys(recipe.name for recipe in recipes):
        mine = [(r, m["folder"]) for r, m in zip(recipes, plan["members"], strict=True)
                if r.name == recipe_name and m["folder"] in missing]  # fmt: skip
        if mine:
            array = Array(f"{name}-{recipe_name}", [], request.nodes, request.processes, throttle=cluster.throttle)
            gpus = array.gpus_per_node(cluster)
            calls = [TrainJob(r.to_json(), str(out / plan["cache"]), str(out / f), cluster.signal_s, time_s, gpus)
                     for r, f in mine]  # fmt: skip
            arrays.append(replace(array, calls=calls))
    before = Array(f"{name}-prepare", [PrepareJob(str(out))], gpus=False)
    last = Array(f"{name}-finish", [], gpus=DOORS[plan["task"]].FINISH_ON_GPU)
    final = FinishJob(str(out), request.weights, last.gpus_per_node(cluster))
    return Jobs(cluster, before if prepare else None, arrays, replace(last, calls=[final]))


def _check_slow(recipes: Sequence[Recipe], cluster: Cluster) -> None:
    """On nodes without GPUs: a note on what takes weeks there, or UserError where nobody wrote that they have none."""
    where = f"partition {cluster.partition}" if cluster.partition else f"cluster {cluster.name}"
    slow = slow_without_gpu(recipes)
    if slow and cluster.name == HERE and os.environ.get("MEDTRAIN_ALLOW_CPU") != "1":
        raise UserError(f"{slow[0]} wants a GPU, and {where} has none: sbatch -p PARTITION with GPUs, name a "
                        "--cluster, or let it train on CPUs with MEDTRAIN_ALLOW_CPU=1.")  # fmt: skip
    say_slow(recipes, f"{where} has no GPUs")


def table(jobs: Jobs) -> str:
    """The plan as a table."""
    lines: list[list[object]] = []
    for array in jobs.all:
        tasks = len(array.calls)
        waits = "the members, however they ended" if array is jobs.finish else (
            "prepare has succeeded" if jobs.prepare and array is not jobs.prepare else "")  # fmt: skip
        hours = f"{array.gpu_hours(jobs.cluster):g}"
        lines.append([array.name, tasks, min(array.throttle or tasks, tasks), array.nodes, array.processes,
                      array.gpus_per_node(jobs.cluster), array.on(jobs.cluster).time, hours, waits])  # fmt: skip
    members = sum(len(array.calls) for array in jobs.arrays)
    total = f"{members} members, at most {jobs.gpu_hours:g} GPU-hours if none is requeued."
    return to_markdown([HEAD, *lines], [total])


def check_budget(jobs: Jobs, most: float | None) -> None:
    """Raise UserError where the jobs may take more than `most` GPU-hours."""
    if most is not None and jobs.gpu_hours > most:
        raise UserError(
            f"the plan takes up to {jobs.gpu_hours:g} GPU-hours, more than --max-gpu-hours {most:g}: "
            "lower --time, --seeds, --folds or --models."
        )


def print_scripts(jobs: Jobs, out: Path) -> None:
    """The plan, and the script of every job as sbatch would get it."""
    print(table(jobs))
    for array in jobs.all:
        after = "" if array is jobs.all[0] else "afterany:JOBS" if array is jobs.finish else "afterok:PREPARE"
        print(f"# ---- {array.name}\n{submit.text(jobs.cluster, array, out / 'jobs', out / 'code' / 'NOW', after)}")
