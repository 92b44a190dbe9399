"""A job as it sees itself on its nodes: ranks from SLURM's variables, and what it does when SLURM warns it.

SLURM sends USR2 before a time limit or a preemption, to every task; TERM comes with `scancel` and with preemptions that
give no warning. A job asks to be requeued itself, because SLURM requeues neither what a time limit ended nor what ends
by itself while it is preempted.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from medslurm import commands

WARNING, END = "warning", "end"
# What a step, a validation or a scan may take after the warning before the job is requeued as it is.
MARGIN_S = 30
# Longer than SLURM lets a process live after a warning.
UNTIL_KILLED_S = 3600
# A job leaves so many nodes that lack what it asked for: where a third one does, all may.
MOST_LEFT = 2
# How long the other processes of a node wait for the first one to ask to be started elsewhere.
UNTIL_ASKED_S = 60


@dataclass(frozen=True)
class ThisJob:
    """This process's place. `name` is the id as users type it (12_3), `raw` the one of SLURM's variables."""

    name: str
    raw: str
    rank: int
    world: int
    local_rank: int
    local_world: int
    node: str
    nodes: tuple[str, ...]
    restarts: int

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for the job."""
        return self.rank == 0

    def export_ranks(self) -> None:
        """Set RANK and the others as torchrun does; MASTER_ADDR is the first node, and no port is chosen: rank 0 tells
        the others the one that it was given (see `medtrain.distributed`).
        """
        os.environ |= {
            "RANK": str(self.rank), "WORLD_SIZE": str(self.world), "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world), "MASTER_ADDR": self.nodes[0],
        }  # fmt: skip

    def requeue(self) -> bool:
        """Ask SLURM to run this job again, while the controller is away until SLURM ends this process; whether it is
        taken. It refuses where the job is requeued already, for one.

        By name: the last task of an array has the array's own number, which would requeue all of its tasks.
        """
        words = ["scontrol", "requeue", self.name]
        try:
            done = commands.call(words, patience_s=UNTIL_KILLED_S)
        except commands.ClusterError:  # inside a container: the batch script outside asks (see `submit.after_srun`)
            Path(os.environ["SUBMITIT_FOLDER"], f".requeue-{self.raw}").touch()
            return True
        if done.returncode:
            why = commands.words_of(done)
            print(f"error: SLURM does not requeue job {self.name} ({why}): --resume goes on with what is missing",
                  file=sys.stderr, flush=True)  # fmt: skip
        else:
            print(f"requeued job {self.name}", flush=True)
        return done.returncode == 0

    def taken(self) -> bool:
        """Whether SLURM is taking this job away, for another one or at its time limit, rather than cancelling it."""
        try:
            told = commands.call(["scontrol", "-o", "show", "job", self.name], patience_s=15).stdout
        except commands.ClusterError:
            return False
        preempted = re.search(r"\bPreemptTime=(?!None|Unknown|N/A)\S", told)
        return "JobState=CANCELLED" not in told and bool(preempted or re.search(r"\bReason=TimeLimit\b", told))

    def leave_node(self) -> None:
        """Have SLURM run this job again, and keep it and the tasks of its array that wait off this node: one whose GPUs
        are broken would else take a task after another. Ends this process, unless the job has left MOST_LEFT nodes or
        SLURM refuses.
        """
        if self.local_rank:  # the first one asks, unless its own GPU is sound
            time.sleep(UNTIL_ASKED_S)
        path = Path(os.environ["SUBMITIT_FOLDER"], f".left-{self.raw}")
        left = path.read_text(encoding="utf-8").split() if path.is_file() else []
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it comes with the requeue
        if len(left) >= MOST_LEFT or not self.requeue():
            return
        path.write_text(" ".join([*left, self.node]), encoding="utf-8")
        with contextlib.suppress(commands.ClusterError):  # inside a container: it is started anywhere
            self._avoid(self.node)
        sys.stdout.flush()
        os._exit(0)

    def _avoid(self, node: str) -> None:
        """Keep a node away from those of the array that wait."""
        told = commands.call(["scontrol", "-o", "show", "job", self.name]).stdout
        before = re.findall(r"\bExcNodeList=(?!\(null\))(\S+)", told)[:1]
        nodes = f"ExcNodeList={','.join([*before, node])}"
        commands.call(["scontrol", "update", f"JobId={self.name.split('_')[0]}", nodes])  # refused of those that run

    def leave(self, told: str) -> NoReturn:
        """End this process after `told`: WARNING, END, or "" where another rank was told first.

        Rank 0 has the job requeued after a warning, and where TERM meant a preemption (in its grace time SLURM requeues
        nothing that ends by itself) or a time limit (its warning may come before Python listens); refused, it ends with
        status 1, or jobs that wait for its success would start. The others end at once and with status 0: a status
        would make srun kill rank 0 before it has saved and asked, and libraries may wait for a network that is no more.
        """
        status = 0
        if self.is_main:
            again = told != END or self.taken()
            status = (0 if self.requeue() else 1) if again else 143
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def this_job() -> ThisJob | None:
    """Where this process runs, or None outside a job that submitit started on SLURM."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm" or "SLURM_JOB_ID" not in os.environ:
        return None
    from submitit.slurm.slurm import SlurmJobEnvironment

    env = SlurmJobEnvironment()
    nodes = tuple(env.hostnames)
    return ThisJob(
        name=env.job_id, raw=os.environ["SLURM_JOB_ID"], rank=env.global_rank, world=env.num_tasks,
        local_rank=env.local_rank, local_world=max(1, env.num_tasks // env.num_nodes),
        node=os.environ.get("SLURMD_NODENAME", env.hostname), nodes=nodes,
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    )  # fmt: skip


class Warned:
    """Listens to SLURM's signals: `told` is "", WARNING or END, for the job to ask between two steps.

    `patience_s` after a warning rank 0 gives up waiting for such a moment and has the job requeued as it is; `stuck` is
    called just before.
    """

    def __init__(self, job: ThisJob, patience_s: float, stuck: Callable[[], None] | None = None):
        self.job, self.patience_s, self.stuck, self.told = job, patience_s, stuck, ""
        signal.signal(signal.SIGUSR2, self._warning)
        signal.signal(signal.SIGTERM, self._end)

    def __call__(self) -> bool:
        """Whether the job should save and leave."""
        return bool(self.told)

    def _warning(self, number: int, frame: object) -> None:
        if self.told:
            return
        self.told = WARNING
        print(f"SLURM warns job {self.job.name} on {self.job.node}", flush=True)
        if self.job.is_main:
            timer = threading.Timer(self.patience_s, self._give_up)
            timer.daemon = True
            timer.start()

    def _end(self, number: int, frame: object) -> None:
        self.told = self.told or END

    def _give_up(self) -> None:
        print(f"no step ended within {self.patience_s:.0f} s of the warning", flush=True)
        try:
            if self.stuck:
                self.stuck()
        finally:  # also where a full disk, say, keeps it from being noted
            self.job.leave(WARNING)


def patience(signal_s: int) -> float:
    """How long a job may look for a good moment: less than SLURM gives it."""
    return max(signal_s / 2, signal_s - MARGIN_S)


def restart_on_warning(job: ThisJob) -> None:
    """For work that may be cut anywhere and goes on by itself: a warning has it requeued at once."""
    signal.signal(signal.SIGUSR2, lambda number, frame: job.leave(WARNING))
    signal.signal(signal.SIGTERM, lambda number, frame: job.leave(END))
