"""Submit a sweep to a cluster, or what it lacks; follow it, cancel it."""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medlaunch.arrays import Jobs, check_budget, make_jobs, print_scripts, table
from medlaunch.follow import EVERY_S, follow, show_table
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
    write_plan,
)
from medlaunch.report import JOBS, Submitted, add_jobs, latest, read_jobs, standings
from medlaunch.tasks import find_sweep
from medslurm import commands, snapshot, submit
from medslurm.cluster import HERE, Cluster, minutes, read_cluster, remembered
from medslurm.commands import ClusterError
from medslurm.local import own_folder
from medslurm.submit import Array
from medtrain.errors import UserError
from medtrain.files import read_json
from medtrain.lock import locked
from medtrain.processes import signals_wait


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
        cluster = remembered(known)
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


def run(out: Path, request: Request, *, resume: bool, dry_run: bool = False, max_gpu_hours: float | None = None,
        following: bool = False, every_s: float = EVERY_S) -> int:  # fmt: skip
    """Plan and submit a sweep (or, with `resume`, what it lacks), and follow it if asked; returns the exit code."""
    out = out.absolute()
    for letter, why in (("%", "SLURM reads as a pattern in the names of log files"), (":", "parts PYTHONPATH")):
        if letter in str(out):
            raise UserError(f"{out} has a {letter}, which {why}: take another --out.")
    with slurms_words():
        plan = _plan(out, request, resume)
        cluster = open_cluster(read_request(plan), plan.get("cluster"))
        if dry_run:
            jobs = Submission(out, plan, cluster, read_jobs(out), _live_if_known(out)).jobs()
            print_scripts(jobs, out)
            check_budget(jobs, max_gpu_hours)
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
            found = Submission(out, plan, cluster, submitted, live)
            jobs = found.jobs()
            if not jobs.arrays and not found.needs_finish:
                running = sum(job.kind == "train" for job in submitted if job.job in live)
                print(f"nothing is missing in {out}" + (f", {running} members wait or run" if running else ""))
            else:
                found.submit(jobs, max_gpu_hours)
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


def _finished(out: Path, plan: dict[str, Any]) -> int:
    if not (out / "table.md").is_file():
        return 0
    show_table(out, plan)
    return 3 if read_json(out / "finish.json").get("missing") else 0


def _plan(out: Path, request: Request, resume: bool) -> dict[str, Any]:
    """The plan that was typed, or with `resume` the one in the folder; raises UserError where the two differ."""
    there = read_plan(out) if resume or (out / PLAN).is_file() else None
    known = read_request(there) if there else None
    if there and known and resume:  # another cluster, time or throttle may go on with it
        whole = not request.sweep
        if not request.cluster:
            _check_owner(known.cluster_file)
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


def _check_owner(cluster_file: str) -> None:
    """Refuse a cluster file that only plan.json names and that is another user's: its lines of shell would run."""
    path = Path(cluster_file)
    if cluster_file and path.is_file() and path.stat().st_uid not in (0, os.getuid()):
        raise UserError(f"{path}, which {PLAN} names, is another user's: name it with --cluster and --cluster-file.")


@dataclass(frozen=True)
class Submission:
    """A sweep's folder as a submission finds it: every job so far, and which of them wait or run."""

    out: Path
    plan: dict[str, Any]
    cluster: Cluster
    submitted: Sequence[Submitted]
    live: set[str]

    @property
    def missing(self) -> set[str]:
        """Folders of members that are neither done nor under way."""
        jobs = latest(self.submitted, "train")
        return {
            member.folder
            for member in standings(self.out, self.plan, {})
            if member.state != "done" and not self._lives(jobs.get(member.folder))
        }

    @property
    def needs_finish(self) -> bool:
        """Whether no final job is under way, and none has told of all members."""
        if self._lives(latest(self.submitted, "finish").get("")):
            return False
        path = self.out / "finish.json"
        told = read_json(path) if path.is_file() else {}
        return told.get("status") != "done" or bool(told.get("missing"))

    @property
    def is_prepared(self) -> bool:
        """Whether the data are prepared, or will be by a job that is under way."""
        there = (self.out / "prepared.json").is_file() and (self.out / self.plan["cache"]).is_file()
        return there or self._lives(latest(self.submitted, "prepare").get(""))

    def _lives(self, job: Submitted | None) -> bool:
        return job is not None and job.job in self.live

    def jobs(self) -> Jobs:
        """What is to be submitted."""
        missing, recipes = self.missing, read_recipes(self.plan, self.out)
        prepare = bool(missing) and not self.is_prepared
        return make_jobs(self.out, self.plan, recipes, missing, self.cluster, prepare=prepare)

    def submit(self, jobs: Jobs, max_gpu_hours: float | None = None) -> None:
        """Check and submit; raises UserError or ClusterError, if possible before anything is submitted."""
        print(table(jobs), flush=True)
        check_budget(jobs, max_gpu_hours)
        for array in jobs.all:
            submit.check(jobs.cluster, array, self.out / "jobs")
        for name in ("jobs", "code"):
            own_folder(self.out / name)
        write_plan(self.out, {**self.plan, "cluster": dataclasses.asdict(jobs.cluster)})
        try:
            self._submit(jobs)
        except ClusterError as error:
            if len(read_jobs(self.out)) == len(self.submitted):
                raise
            words = f"{error} What was submitted before that stays; once mended, --resume {self.out} submits the rest."
            raise ClusterError(words) from None

    def _submit(self, jobs: Jobs) -> None:
        """Submit in order, noting what each call of sbatch took at once, so that a crash in between loses no job."""
        code = snapshot.take(self.out / "code", packages())
        folder, cluster = self.out / "jobs", jobs.cluster
        under_way = [job for job in self.submitted if self._lives(job)]

        def take(kind: str, array: Array, names: Sequence[str], after: str) -> list[str]:
            taken: list[str] = []
            parts = submit.submit(cluster, array, folder, code, after)
            while len(taken) < len(names):
                with signals_wait(signal.SIGTERM, signal.SIGHUP):
                    ids = next(parts)
                    _note(self.out, [Submitted(kind, job, name, str(submit.log_of(folder, job)), code.name)
                                     for job, name in zip(ids, names[len(taken) :], strict=False)])  # fmt: skip
                taken += ids
                many = f", {len(ids)} tasks" if len(ids) > 1 else ""
                print(f"submitted {kind}: job {ids[0].split('_')[0]}{many}", flush=True)
            return taken

        first = submit.after("afterok", [job.job for job in under_way if job.kind == "prepare"])
        if jobs.prepare:
            first = submit.after("afterok", take("prepare", jobs.prepare, [""], ""))
        waiting = [job.job for job in under_way if job.kind != "finish"]
        for array in jobs.arrays:
            waiting += take("train", array, [Path(call.out).name for call in array.calls], first)
        take("finish", jobs.finish, [""], submit.after("afterany", waiting))
        old = latest(self.submitted, "finish").get("")
        if old and self._lives(old):  # the new one waits for what the old one waited for, too
            commands.cancel(commands.live([old.job], folder))


def _note(out: Path, jobs: Sequence[Submitted]) -> None:
    """Add to jobs.csv; jobs that can not be noted are cancelled, as nothing would know of them."""
    try:
        add_jobs(out, jobs)
    except OSError:
        commands.cancel(job.job for job in jobs)
        raise


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


def cancel(out: Path) -> int:
    """Cancel every job of a sweep that waits or runs; what is trained stays."""
    read_plan(out)
    if not read_jobs(out):
        raise UserError(f"{out} was not submitted to a cluster: stop the command that runs it there.")
    with slurms_words(), locked(out, "cancelling this sweep"):
        jobs = [job.job for job in read_jobs(out)]
        live = commands.live(jobs, out / "jobs")
        commands.cancel(live)
        others = len(commands.live(jobs) - live)
    if others:
        print(f"note: of the jobs that {JOBS} names, {others} work for another folder: left alone")
    print(f"{len(live)} jobs of {out} cancelled; --resume goes on from what is saved")
    return 0
