"""Submit a sweep to a cluster: a job that prepares, an array for each recipe, a final job after all of them."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medlaunch.follow import follow, show_table
from medlaunch.jobs import FinishJob, PrepareJob, TrainJob
from medlaunch.options import DOORS, find_sweep
from medlaunch.plan import (
    PLAN,
    Request,
    check_early,
    check_place,
    check_same,
    make_plan,
    read_plan,
    read_recipes,
    read_request,
    say_slow,
    slow_without_gpu,
    write_plan,
)
from medlaunch.report import Submitted, add_jobs, latest, read_jobs, standings
from medslurm import commands, snapshot, submit
from medslurm.cluster import HERE, Cluster, minutes, read_cluster
from medslurm.commands import ClusterError
from medslurm.local import own_folder
from medslurm.submit import Array
from medtrain.errors import UserError
from medtrain.files import read_json
from medtrain.lock import locked
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


@contextlib.contextmanager
def slurms_words() -> Iterator[None]:
    """SLURM's refusals are the user's to mend."""
    try:
        yield
    except ClusterError as error:
        raise UserError(str(error)) from None


def open_cluster(request: Request, known: dict[str, Any] | None = None) -> Cluster:
    """The request's cluster with its --time and --throttle. `known` is one that an earlier submission found by itself,
    for when this is typed outside of a batch job.
    """
    file = Path(request.cluster_file) if request.cluster_file else None
    if request.cluster == HERE and known and "SLURM_JOB_ID" not in os.environ:
        cluster = Cluster(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})
    else:
        cluster = read_cluster(request.cluster, file)
    if request.time:
        if minutes(request.time) is None:
            raise UserError(f"--time {request.time} is no time: write it as 12:00:00 or 2-00:00:00.")
        cluster = replace(cluster, time=request.time)
    if cluster.gpus_per_node and request.processes > cluster.gpus_per_node:
        raise UserError(
            f"--processes {request.processes}: a node of {cluster.name} has {cluster.gpus_per_node} GPUs, one for each."
        )
    return replace(cluster, throttle=request.throttle or cluster.throttle)


def check_slow(recipes: Sequence[Recipe], cluster: Cluster) -> None:
    """On nodes without GPUs: a note on what takes weeks there, or UserError where nobody wrote that they have none."""
    where = f"partition {cluster.partition}" if cluster.partition else f"cluster {cluster.name}"
    slow = slow_without_gpu(recipes)
    if slow and cluster.name == HERE and os.environ.get("MEDTRAIN_ALLOW_CPU") != "1":
        raise UserError(f"{slow[0]} wants a GPU, and {where} has none: sbatch -p PARTITION with GPUs, name a "
                        "--cluster, or let it train on CPUs with MEDTRAIN_ALLOW_CPU=1.")  # fmt: skip
    say_slow(recipes, f"{where} has no GPUs")


def make_jobs(out: Path, plan: dict[str, Any], recipes: Sequence[Recipe], missing: set[str], cluster: Cluster,
              prepare: bool) -> Jobs:  # fmt: skip
    """The jobs that are needed for the missing members."""
    request = read_request(plan)
    if not cluster.gpus_per_node and any(recipe.train.compile == "replay" for recipe in recipes):
        refuse_replay(f"nodes of {cluster.name} have no GPU")
    if not cluster.gpus_per_node:
        check_slow(recipes, cluster)
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


def run(out: Path, request: Request, *, resume: bool, dry_run: bool = False, max_gpu_hours: float | None = None,
        following: bool = False, every_s: float = 10.0) -> int:  # fmt: skip
    """Plan and submit a sweep (or, with `resume`, what it lacks), and follow it if asked; returns the exit code."""
    out = out.absolute()
    if "%" in str(out):
        raise UserError(f"{out} has a %, which SLURM reads as a pattern in the names of log files: take another --out.")
    with slurms_words():
        plan = _plan(out, request, resume)
        cluster = open_cluster(read_request(plan), plan.get("cluster"))
        if dry_run:
            jobs = _needed(out, plan, cluster, read_jobs(out), _live_if_known(out))
            _print_dry(jobs, out)
            _budget(jobs, max_gpu_hours)
            return 0
        with locked(out, "submitting this sweep"):
            submitted = read_jobs(out)
            live = commands.live(job.job for job in submitted)
            waits = bool(live)
            if live and not (resume or following):
                some = ", ".join(sorted(live)[:3]) + (", …" if len(live) > 3 else "")
                raise UserError(
                    f"{out} has jobs that wait or run ({some}): look with launch/status.py, go on with --resume {out}, "
                    "or give another --out."
                )
            jobs = _needed(out, plan, cluster, submitted, live)
            if not jobs.arrays and not _needs_finish(out, live, submitted):
                running = sum(job.kind == "train" for job in submitted if job.job in live)
                print(f"nothing is missing in {out}" + (f", {running} members wait or run" if running else ""))
            else:
                _submit_checked(out, plan, jobs, submitted, live, max_gpu_hours)
                waits = True
    if not waits:
        return _finished(out, plan)
    print(f"look:   python launch/status.py {out}\ncancel: python launch/sweep.py cancel {out}", flush=True)
    return follow(out, every_s) if following else 0


def _live_if_known(out: Path) -> set[str]:
    """Jobs that wait or run; none where no queue answers, because a dry run is allowed anywhere."""
    try:
        return commands.live(job.job for job in read_jobs(out))
    except ClusterError:
        return set()


def _needed(out: Path, plan: dict[str, Any], cluster: Cluster, submitted: Sequence[Submitted], live: set[str]) -> Jobs:
    missing = _missing(out, plan, submitted, live)
    prepare = bool(missing) and not _is_prepared(out, live)
    return make_jobs(out, plan, read_recipes(plan, out), missing, cluster, prepare=prepare)


def _submit_checked(out: Path, plan: dict[str, Any], jobs: Jobs, submitted: Sequence[Submitted], live: set[str],
                    max_gpu_hours: float | None) -> None:  # fmt: skip
    print(table(jobs), flush=True)
    _budget(jobs, max_gpu_hours)
    for array in jobs.all:
        submit.check(jobs.cluster, array, out / "jobs")
    own_folder(out / "jobs")
    write_plan(out, {**plan, "cluster": dataclasses.asdict(jobs.cluster)})
    before = len(submitted)
    try:
        _submit(out, jobs, submitted, live)
    except ClusterError as error:
        if len(read_jobs(out)) == before:
            raise
        words = f"{error} What was submitted before that stays; once mended, --resume {out} submits the rest."
        raise ClusterError(words) from None


def _plan(out: Path, request: Request, resume: bool) -> dict[str, Any]:
    """The plan that was typed, or with `resume` the one in the folder; raises UserError where the two differ."""
    there = read_plan(out) if resume or (out / PLAN).is_file() else None
    known = read_request(there) if there else None
    if there and known and resume:  # another cluster, time or throttle may go on with it
        whole = not request.sweep
        request = replace(request if request.sweep else known, cluster=request.cluster or known.cluster,
                          cluster_file=request.cluster_file if request.cluster else known.cluster_file,
                          time=request.time or known.time, throttle=request.throttle or known.throttle)  # fmt: skip
        if not request.cluster:
            raise UserError(f"{out} was run on one machine: name a --cluster, or run the same command again there.")
        if whole:
            return {**there, "request": dataclasses.asdict(request)}
    check_place(out)
    door = find_sweep(request.sweep)
    recipes = request.recipes()
    check_early(recipes, request)
    source = door.look(Path(request.data), request.label_map)
    plan = make_plan(request, door.expand(recipes, source, request.cancers))
    if there:
        check_same(out, there, plan)
    return plan


def _missing(out: Path, plan: dict[str, Any], submitted: Sequence[Submitted], live: set[str]) -> set[str]:
    jobs = latest(submitted, "train")
    return {
        member.folder
        for member in standings(out, plan, {})
        if member.state != "done" and not (member.folder in jobs and jobs[member.folder].job in live)
    }


def _needs_finish(out: Path, live: set[str], submitted: Sequence[Submitted]) -> bool:
    final = latest(submitted, "finish").get("")
    if final and final.job in live:
        return False
    path = out / "finish.json"
    told = read_json(path) if path.is_file() else {}
    return told.get("status") != "done" or bool(told.get("missing"))


def _finished(out: Path, plan: dict[str, Any]) -> int:
    if not (out / "table.md").is_file():
        return 0
    show_table(out, plan)
    return 3 if read_json(out / "finish.json").get("missing") else 0


def _is_prepared(out: Path, live: set[str]) -> bool:
    if (out / "prepared.json").is_file() and any(out.glob("*.h5")):
        return True
    job = latest(read_jobs(out), "prepare").get("")
    return bool(job and job.job in live)


def _budget(jobs: Jobs, most: float | None) -> None:
    if most is not None and jobs.gpu_hours > most:
        raise UserError(
            f"the plan takes up to {jobs.gpu_hours:g} GPU-hours, more than --max-gpu-hours {most:g}: "
            "lower --time, --seeds, --folds or --models."
        )


def _print_dry(jobs: Jobs, out: Path) -> None:
    print(table(jobs))
    for array in jobs.all:
        after = "" if array is jobs.all[0] else "afterany:JOBS" if array is jobs.finish else "afterok:PREPARE"
        print(f"# ---- {array.name}\n{submit.text(jobs.cluster, array, out / 'jobs', out / 'code' / 'NOW', after)}")


def packages() -> dict[str, Path]:
    """Every package of this program by its import name, with its folder: what one of them imports must be copied, too,
    or a job would take it from the checkout as it is by then.
    """
    import medcls
    import medkernels
    import medlaunch
    import medseg
    import medslurm
    import medtrain

    modules = (medtrain, medseg, medcls, medlaunch, medslurm, medkernels)
    return {module.__name__: Path(next(iter(module.__path__))) for module in modules}


def _submit(out: Path, jobs: Jobs, submitted: Sequence[Submitted], live: set[str]) -> None:
    """Submit in order, noting each array at once, so that a crash in between loses no job."""
    code = snapshot.take(out / "code", packages())
    folder, cluster = out / "jobs", jobs.cluster
    old = latest(submitted, "finish").get("")

    def note(kind: str, ids: Sequence[str], folders: Sequence[str]) -> None:
        add_jobs(out, [Submitted(kind, job, name, str(submit.log_of(folder, job)), code.name)
                       for job, name in zip(ids, folders, strict=True)])  # fmt: skip
        print(f"submitted {kind}: job {ids[0].split('_')[0]}" + (f", {len(ids)} tasks" if len(ids) > 1 else ""),
              flush=True)  # fmt: skip

    first = ""
    waiting = [job.job for job in submitted if job.job in live and job.kind != "finish"]
    if jobs.prepare:
        ids = submit.submit(cluster, jobs.prepare, folder, code)
        note("prepare", ids, [""])
        first = submit.after("afterok", ids)
    else:
        first = submit.after("afterok", [job.job for job in submitted if job.job in live and job.kind == "prepare"])
    for array in jobs.arrays:
        ids = submit.submit(cluster, array, folder, code, first)
        note("train", ids, [Path(call.out).name for call in array.calls])
        waiting += ids
    note("finish", submit.submit(cluster, jobs.finish, folder, code, submit.after("afterany", waiting)), [""])
    if old and old.job in live:  # the new one waits for what the old one waited for, too
        commands.cancel([old.job])


def cancel(out: Path) -> int:
    """Cancel every job of a sweep that waits or runs; what is trained stays."""
    read_plan(out)
    if not read_jobs(out):
        raise UserError(f"{out} was not submitted to a cluster: stop the command that runs it there.")
    with slurms_words(), locked(out, "cancelling this sweep"):
        live = commands.live(job.job for job in read_jobs(out))
        commands.cancel(live)
    print(f"{len(live)} jobs of {out} cancelled; --resume goes on from what is saved")
    return 0
