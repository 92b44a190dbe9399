"""Submit callables to SLURM as job arrays with submitit."""

import contextlib
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medslurm import commands
from medslurm.cluster import Cluster, minutes
from medslurm.commands import ClusterError

# A shell between srun and Python ignores the warning until Python listens: by default it would kill the job.
PATIENT_SHELL = 'sh -c \'trap "" USR2; exec "$@"\' sh'
DEFAULT_MAX_ARRAY = 1001


@dataclass(frozen=True)
class Array:
    """Calls that run as the tasks of one array: each on `nodes` nodes with `processes` processes on every node."""

    name: str
    calls: Sequence[Callable[[], Any]]
    nodes: int = 1
    processes: int = 1
    gpus: bool = True
    throttle: int = 0

    def on(self, cluster: Cluster) -> Cluster:
        """The cluster as jobs of this kind meet it: time, partition and all else that they ask for."""
        return cluster if self.gpus else cluster.without_gpus()

    def gpus_per_node(self, cluster: Cluster) -> int:
        """GPUs on each of its nodes: one a process."""
        return self.processes if self.gpus and cluster.gpus_per_node else 0

    def gpu_hours(self, cluster: Cluster) -> float:
        """At most, if every task takes its whole time once."""
        return len(self.calls) * self.nodes * self.gpus_per_node(cluster) * (minutes(self.on(cluster).time) or 0) / 60


def executor(cluster: Cluster, array: Array, folder: Path, code: Path, after: str = "") -> Any:
    """submitit's executor with everything that sbatch will be told."""
    cluster = array.on(cluster)
    python = f"{PATIENT_SHELL} {cluster.python_command()}"
    made = _kind()(folder, max_num_timeout=10**6, python=python)
    gpus = array.gpus_per_node(cluster)
    typed = f"{cluster.gpu_type}:{gpus}" if cluster.gpu_type else str(gpus)
    more: dict[str, Any] = {"requeue": True, "chdir": str(folder), **cluster.sbatch}
    if after:
        more["kill-on-invalid-dep"] = "yes"  # else a job after one that failed waits for ever
    if memory := cluster.memory(gpus):
        more["mem"] = memory
    wanted = {
        "job_name": array.name, "time": minutes(cluster.time), "partition": cluster.partition or None,
        "account": cluster.account or None, "qos": cluster.qos or None, "constraint": cluster.constraint or None,
        "nodes": array.nodes, "ntasks_per_node": array.processes, "cpus_per_task": cluster.cpus_per_gpu,
        "gres": f"gpu:{typed}" if gpus and cluster.gpus_as == "gres" else None,
        "gpus_per_node": typed if gpus and cluster.gpus_as == "gpus-per-node" else None,
        "dependency": after or None, "signal_delay_s": cluster.signal_s, "stderr_to_stdout": True, "wckey": None,
        "array_parallelism": array.throttle or max(1, len(array.calls)),
        "srun_args": _srun(cluster),
        "setup": [*cluster.setup_lines(), *_environment(cluster, code)], "teardown": after_srun(folder),
        "additional_parameters": more,
    }  # fmt: skip
    made.update_parameters(**wanted)
    return made


def _kind() -> Any:
    """submitit's executor, also where there is no SLURM: a dry run only writes scripts. sbatch itself is asked before
    anything is submitted.
    """
    import submitit

    class Executor(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2

    return Executor


def _srun(cluster: Cluster) -> list[str]:
    return [
        f"--cpus-per-task={cluster.cpus_per_gpu}",  # srun of today does not take over what sbatch was told
        "--kill-on-bad-exit=1",  # one dead process must end the others
        "--wait=0",  # but one that ended well leaves rank 0 the time to save
        "--export=ALL",  # whatever a site or user has sbatch export: what the script sets must reach Python
        *cluster.srun,
    ]


def _environment(cluster: Cluster, code: Path) -> list[str]:
    return [
        *(["export PYTHONNOUSERSITE=1"] if cluster.container else []),  # not the packages of ~/.local, but the image's
        f"export PYTHONPATH={shlex.quote(str(code))}",
        "export PYTHONSAFEPATH=1",  # else the folder that sbatch was typed in comes before PYTHONPATH
        f"export OMP_NUM_THREADS={cluster.cpus_per_gpu}",
    ]


def after_srun(folder: Path) -> list[str]:
    """Shell after the job: requeue it where it could not ask itself, and end as it ended."""
    mark = f"{shlex.quote(str(folder))}/.requeue-$SLURM_JOB_ID"
    name = "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
    ask = f'scontrol requeue "{name}" || status=1'
    return ["status=$?", f"if [ -e {mark} ]; then rm -f {mark}; {ask}; fi", "exit $status"]


def text(cluster: Cluster, array: Array, folder: Path, code: Path, after: str = "") -> str:
    """The script that sbatch is given."""
    made = executor(cluster, array, folder, code, after)
    if len(array.calls) > 1:
        made.parameters["map_count"] = len(array.calls)
    return made._make_submission_file_text(made._submitit_command_str, "dry")


def check(cluster: Cluster, array: Array, folder: Path) -> None:
    """Ask SLURM whether it would take this job; raises ClusterError in its words with the line that is to blame."""
    key, limit = _key("partition", cluster, array), _key("time", cluster, array)
    asked = array.on(cluster)
    for partition in filter(None, asked.partition.split(",")):
        try:
            longest = commands.partition(partition).get("MaxTime", "UNLIMITED")
        except ClusterError as error:
            if "partition" not in str(error).lower():
                remedy = "Submit from a login node, or try again when its controller is back."
                raise ClusterError(f"SLURM does not answer: {error}. {remedy}") from None
            raise ClusterError(f"{cluster.where(key)}: SLURM says: {error}.") from None
        if (minutes(asked.time) or 0) > (minutes(longest) or 0):
            raise ClusterError(f"{cluster.where(limit)}: partition {partition} allows {longest} at most.")
    first = replace(array, calls=array.calls[: most_tasks()])
    with tempfile.TemporaryDirectory() as place:
        script = Path(place) / "try.sh"
        script.write_text(text(cluster, first, folder, folder), encoding="utf-8")
        with _clean(asked):
            done = commands.call(["sbatch", "--test-only", str(script)])
    if done.returncode:
        words = commands.words_of(done)
        if "configuration is not available" in words and (away := commands.nodes_away(asked.partition)):
            print(f"note: {array.name}: no node that is up has what it asks for, {away} are down or drained: it waits")
            return
        raise ClusterError(f"{cluster.where(_to_blame(words, cluster, array))}: SLURM says: {words}.")


def _key(name: str, cluster: Cluster, array: Array) -> str:
    """The key of the cluster file that tells this job's partition, time and so on."""
    others = [f"cpu_{name}"] if not array.gpus else ["mem_per_gpu"] if name == "mem" else []
    return next((key for key in others if getattr(cluster, key, "")), name)


def _to_blame(words: str, cluster: Cluster, array: Array) -> str:
    """The key of the cluster file that SLURM's refusal is about."""
    # no node has all of it: of what a node must have, memory is most often too much
    memory = cluster.mem or cluster.mem_per_gpu
    told = {"account": "account", "qos": "qos", "time limit": "time", "constraint": "constraint",
            "feature": "constraint", "node configuration": "mem" if memory else "cpus_per_gpu", "gres": "gpus_per_node",
            "generic resource": "gpus_per_node", "memory": "mem", "partition": "partition",
            "cpu": "cpus_per_gpu"}  # fmt: skip
    for key in (_key(name, cluster, array) for word, name in told.items() if word in words.lower()):
        if key in cluster.lines or not cluster.lines:
            return key
    return _key("partition", cluster, array)


def submit(cluster: Cluster, array: Array, folder: Path, code: Path, after: str = "") -> Iterator[list[str]]:
    """Submit in as few calls of sbatch as the controller's MaxArraySize allows; yields after each of them the job ids
    of its calls in order, such as 12_0, 12_1 (or 12 for a single one). Raises ClusterError in SLURM's words.
    """
    most = most_tasks()
    parts = [array.calls[start : start + most] for start in range(0, len(array.calls), most)]
    share = -(-array.throttle // len(parts)) if array.throttle else 0
    for part in parts:
        made = executor(cluster, replace(array, calls=part, throttle=share), folder, code, after)
        with _clean(array.on(cluster)):
            jobs = _retried(made, part)
        yield [job.job_id for job in jobs]


def most_tasks() -> int:
    """Tasks that the controller takes in one array; 1 where it takes no arrays."""
    return max(1, int(commands.config("MaxArraySize") or DEFAULT_MAX_ARRAY))


def _retried(made: Any, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    end = time.monotonic() + commands.PATIENCE_S
    while True:
        try:
            return made.submit_array(list(calls))
        except Exception as error:  # submitit wraps sbatch's refusal in several kinds
            words = str(error)
            if not commands.UNREACHABLE.search(words) or time.monotonic() > end:
                lines = [line for line in words.splitlines() if "error" in line.lower()] or words.splitlines()[-1:]
                raise ClusterError("sbatch refuses: " + re.sub(r"sbatch: (error: )?", "", "; ".join(lines))) from error
            time.sleep(5)


# Variables of sbatch that would override what a job's own script says.
SCRIPTS_OWN = ("ARRAY_INX", "JOB_NAME", "NO_REQUEUE", "OPEN_MODE", "REQUEUE", "SIGNAL", "TIMELIMIT")


@contextlib.contextmanager
def _clean(asked: Cluster) -> Iterator[None]:
    """Without the variables of the batch job that this may be typed in, or those that would override what is asked."""
    import submitit

    kept = {key: os.environ[key] for key in ("SLURM_CONF", "SLURM_CLUSTERS") if key in os.environ}  # which controller
    if "SLURM_JOB_ID" not in os.environ:  # on a login node SBATCH_ACCOUNT and the like are the user's own
        told = [name for name in ("account", "constraint", "partition", "qos") if getattr(asked, name)]
        ours = {f"SBATCH_{name.upper()}" for name in (*SCRIPTS_OWN, *told)}
        kept |= {key: value for key, value in os.environ.items() if key.startswith("SBATCH_") and key not in ours}
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield


def log_of(folder: Path, job: str) -> Path:
    """Where the first process of a job writes."""
    return folder / f"{job}_0_log.out"


def after(kind: str, jobs: Sequence[str]) -> str:
    """sbatch's dependency on jobs: afterok or afterany."""
    ids = dict.fromkeys(job.split("_")[0] for job in jobs)
    return ":".join([kind, *ids]) if ids else ""
