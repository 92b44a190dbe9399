"""What a job runs: small callables that can be pickled; heavy imports come inside."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medslurm.job import ThisJob

STUCK = 3
# Between the nodes of one job.
SIGNALS_S = 5.0
# Turns of a final job: an ensemble of volumes goes on from the cases that it has predicted, the rest takes minutes.
MOST_TURNS = 20


@dataclass
class PrepareJob:
    """Make a sweep's cache as plan.json asks for it; leaves prepared.json, or prepare_failed.json with the reason."""

    sweep: str

    def __call__(self) -> None:
        from medlaunch.plan import read_plan, read_recipes, read_request
        from medlaunch.tasks import DOORS
        from medslurm.job import restart_on_warning, this_job
        from medtrain.files import write_json

        sweep = Path(self.sweep)
        job = this_job()
        if job:
            restart_on_warning(job)
        failed = sweep / "prepare_failed.json"
        try:
            failed.unlink(missing_ok=True)
            plan = read_plan(sweep)
            asked = read_request(plan)
            how = SimpleNamespace(workers=own_cpus(), label_map=asked.label_map, strict=asked.strict)
            door = DOORS[plan["task"]]
            recipes = read_recipes(plan, sweep)
            cache = door.open_cache(door.prepare(Path(asked.data), sweep, recipes, how))
            check_some(door, recipes, cache, asked.weights)
            write_json(sweep / "prepared.json", {"fingerprint": cache.fingerprint})
        except Exception as error:
            where = f" (on {job.node})" if job else ""
            write_json(failed, {"status": "failed", "reason": reason_of(error) + where, "user": is_users(error)})
            raise


@dataclass
class TrainJob:
    """Train one member, on every process of the job. On SLURM it saves and is requeued when it is warned.

    `time_s` is the job's time limit, `gpus` how many it was given on each node: with any it does not train on a CPU.
    """

    recipe: str  # JSON
    cache: str
    out: str
    signal_s: int = 120
    time_s: int = 0
    gpus: int = 0

    def __call__(self) -> dict[str, Any]:
        from medslurm.job import this_job

        job = this_job()
        if job:
            return self._on_slurm(job)
        import submitit

        if submitit.JobEnvironment().num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        return self._train()

    def _train(self, stop: Any = None, job: "ThisJob | None" = None) -> dict[str, Any]:
        from medlaunch.run import held, is_rank_0, train
        from medlaunch.tasks import read_recipe
        from medtrain.distributed import demand_gpus
        from medtrain.errors import NodeError, Stopped
        from medtrain.files import file_stamp
        from medtrain.lock import InUseError

        out = Path(self.out)
        failed = out / "failed.json"
        before = file_stamp(failed)
        try:
            with held(out):
                if is_rank_0():
                    if file_stamp(failed) == before:  # else it is of another rank of this start
                        failed.unlink(missing_ok=True)
                    if job:
                        note_start(out, job)
                demand_gpus(self.gpus)
                return train(read_recipe(self.recipe, "the job's recipe"), Path(self.cache), out, stop)
        except (Stopped, InUseError):  # in use: that run is still alive
            raise
        except Exception as error:
            if job and isinstance(error, NodeError):
                note(out, left=str(error))
                leave_node(job, error)
            if stop is None or not stop():  # what breaks while the job is being taken away is no fault of the member
                note_failure(failed, error)
            raise

    def _on_slurm(self, job: "ThisJob") -> dict[str, Any]:
        from medslurm.job import Warned, patience
        from medtrain.errors import Stopped
        from medtrain.files import read_json

        out = Path(self.out)
        done = out / "done.json"
        if done.is_file():  # requeued after its last word
            return read_json(done)
        began_s = time.monotonic()
        warned = Warned(job, patience(self.signal_s), stuck=lambda: note_stuck(out, self.time_s, began_s))
        job.export_ranks()
        if job.world > 1:
            os.environ["MEDTRAIN_RENDEZVOUS"] = str(out / f".meet-{job.raw}-{job.restarts}")
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        shown = devices.split(",")
        own = shown[job.local_rank if job.local_rank < len(shown) else 0] or "none"
        print(f"rank {job.rank} of {job.world} on {job.node}: GPU {own} of CUDA_VISIBLE_DEVICES={devices}", flush=True)
        try:
            return self._train(warned, job)
        except Exception as error:
            if isinstance(error, Stopped) or warned():
                if job.is_main and not warned.told:  # another rank was told first, with the same signal
                    time.sleep(SIGNALS_S)
                job.leave(warned.told)
            raise


def own_cpus() -> int:
    """CPUs that this job was given; where SLURM does not bind processes, all of the node's can be seen."""
    seen = len(os.sched_getaffinity(0))
    return min(seen, int(os.environ.get("SLURM_CPUS_PER_TASK") or seen))


def leave_node(job: "ThisJob", error: Exception) -> None:
    """End this process to start the job again on another node, if it has not left several already."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    job.leave_node()


def check_some(door: Any, recipes: Sequence[Any], cache: Any, weights: str) -> None:
    """Refuse what would fail in every member; one of several is left to fail as a row of the table."""
    from medtrain.errors import UserError

    problems: list[UserError] = []
    for recipe in recipes:
        try:
            door.check(recipe, cache, weights)
            return
        except UserError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    from medtrain.errors import Failed

    text = str(error).splitlines()[0] if str(error) else ""
    said = is_users(error) or isinstance(error, Failed)  # sentences for people
    return f"{'' if said else type(error).__name__ + ': '}{text}"[:300]


def is_users(error: BaseException) -> bool:
    """Whether what the user gave is wrong, rather than this program."""
    from medtrain.errors import UserError

    return isinstance(error, UserError)


def unprepared(sweep: Path) -> None:
    """Raise what kept the data from being prepared; nothing can have been trained then."""
    from medtrain.errors import UserError
    from medtrain.files import read_json

    failed = sweep / "prepare_failed.json"
    if failed.is_file() and not (sweep / "prepared.json").is_file():
        told = read_json(failed)
        kind = UserError if told.get("user") else RuntimeError
        raise kind(f"the data could not be prepared: {told['reason']}")


def note_failure(path: Path, error: Exception) -> None:
    """Write failed.json, unless another rank was first: the later ones only lost their partner."""
    from medtrain.files import write_json

    rank = int(os.environ.get("RANK", "0"))
    if not path.exists():
        told = f"rank {rank}: " if rank else ""
        write_json(path, {"status": "failed", "reason": f"{told}{reason_of(error)}"})


def note_start(out: Path, job: "ThisJob") -> None:
    """Write job.json; raises UserError where the last starts, cut by time limits, did not get one step further."""
    from medslurm.submit import log_of
    from medtrain.errors import UserError
    from medtrain.files import read_json, write_json

    path = out / "job.json"
    before: dict[str, Any] = read_json(path) if path.is_file() else {"starts": 0}
    stuck = before.get("stuck", [])
    write_json(path, {
        "job": job.name, "nodes": list(job.nodes), "starts": before["starts"] + 1, "stuck": stuck,
        "log": str(log_of(out.parent / "jobs", job.name)), "started": time.time(),
    })  # fmt: skip
    if len(stuck) >= STUCK and len(set(stuck[-STUCK:])) == 1:
        write_json(path, {**read_json(path), "stuck": []})
        error = UserError(
            f"no step was made after step {stuck[-1]} in {STUCK} whole times: give a longer --time, or less work a "
            "step (data.crop, train.batch)."
        )
        note_failure(out / "failed.json", error)
        raise error


def note_stuck(out: Path, time_s: int, began_s: float | None = None) -> None:
    """Remember in job.json at which step the job was when it could not reach another one in time; it began at
    `began_s` of the monotonic clock (None: just now).

    Only of turns that had most of their time: a preemption soon after the start says nothing of the member.
    """
    from medtrain.files import read_json

    now = time.monotonic()
    if now - (now if began_s is None else began_s) < time_s / 2:
        return
    told = read_json(out / "status.json") if (out / "status.json").is_file() else {"step": 0, "phase": "train"}
    path = out / "job.json"
    if not path.is_file():  # it still waits for the folder
        return
    note(out, stuck=[*read_json(path).get("stuck", []), told["step"]][-STUCK:])


def note(out: Path, **told: Any) -> None:
    """Add to job.json, which `note_start` writes anew at every start."""
    from medtrain.files import read_json, write_json

    path = out / "job.json"
    if path.is_file():
        write_json(path, {**read_json(path), **told})


@dataclass
class FinishJob:
    """Make ensemble, tables and figures of a sweep folder; returns how many members are missing, and leaves
    finish.json. Where it was given `gpus` it does not work on a CPU.
    """

    sweep: str
    weights: str
    gpus: int = 0

    def __call__(self) -> int:
        from medlaunch.plan import read_plan
        from medlaunch.report import settle
        from medlaunch.tasks import DOORS
        from medslurm.job import restart_on_warning, this_job
        from medtrain.distributed import demand_gpus
        from medtrain.errors import NodeError, UserError
        from medtrain.files import read_json, write_json

        sweep = Path(self.sweep)
        job = this_job()
        path = sweep / "finish.json"
        before = read_json(path) if path.is_file() else {}
        about = {"job": job.name if job else before.get("job", "")}  # made again by hand it stays the cluster's
        if job:
            restart_on_warning(job)
        try:
            if job and job.restarts >= MOST_TURNS:
                raise UserError(f"the final job was cut {MOST_TURNS} times: give a longer --time.")
            plan = read_plan(sweep)
            if job:
                settle(sweep, plan)
                unprepared(sweep)
            demand_gpus(self.gpus)
            trained = any((sweep / member["folder"] / "done.json").is_file() for member in plan["members"])
            if trained and not (sweep / plan["cache"]).is_file():
                raise UserError(f"{sweep / plan['cache']} is not there: start the sweep again, which prepares it anew.")
            missing = DOORS[plan["task"]].finish(sweep, plan, self.weights)
            write_json(path, {**about, "status": "done", "missing": missing})
            return missing
        except Exception as error:
            if job and isinstance(error, NodeError):
                leave_node(job, error)
            told = {"status": "failed", "reason": reason_of(error), "user": is_users(error)}
            write_json(path, {**about, **told})
            raise
