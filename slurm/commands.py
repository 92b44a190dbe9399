"""SLURM's programs, called with bounds: what they refuse is passed on in their own words, states are read as values."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 60
# A controller that restarts is back within this; a call is tried so long.
PATIENCE_S = 60
# Any other state, known or not, is of a job that still waits or runs: to submit its work again would do it twice.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
         "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT", "UNKNOWN"}  # fmt: skip
UNREACHABLE = re.compile(
    "unable to contact|connection refused|socket timed out|unexpected message|communication|did not answer in|"
    "zero bytes were transmitted|standby mode", re.I)  # fmt: skip
# Users' own defaults of these programs: filters of the queue would hide jobs.
OWN_DEFAULTS = ("SQUEUE_", "SACCT_", "SINFO_", "SCONTROL_")
SILENT = "squeue does not answer"  # how the note of it begins


class ClusterError(Exception):
    """SLURM or the cluster's description refuses something. The message is one sentence."""


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job or array task: `reason` is why it waits, `code` its exit code as `1:0`, `folder` where
    it works.
    """

    state: str
    reason: str = ""
    node: str = ""
    code: str = ""
    folder: str = ""

    @property
    def active(self) -> bool:
        """Whether it still waits or runs."""
        return self.state not in ENDED


def call(words: Sequence[str], patience_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's programs; while the controller can not be reached it is tried again. Raises ClusterError where
    the program is not there.
    """
    if shutil.which(words[0]) is None:
        raise ClusterError(f"{words[0]} is not on PATH: type this on a login node of the cluster, or leave --cluster.")
    end = time.monotonic() + patience_s
    environment = {key: value for key, value in os.environ.items() if not key.startswith(OWN_DEFAULTS)}
    while True:
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
                                  stdin=subprocess.DEVNULL, env=environment)  # fmt: skip
        except subprocess.TimeoutExpired:
            done = subprocess.CompletedProcess(list(words), 1, "", f"{words[0]} did not answer in {TIMEOUT_S} s")
        if done.returncode == 0 or not UNREACHABLE.search(done.stderr) or time.monotonic() > end:
            return done
        time.sleep(2)


def words_of(done: subprocess.CompletedProcess[str]) -> str:
    """What a program said when it refused, in one line without its own name."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    told = [re.sub(r"^\w+: (error: )?", "", line) for line in lines]
    # the last of many is the one that ended it
    return "; ".join(dict.fromkeys(told if len(told) < 3 else told[-1:]))[:200] or f"exit status {done.returncode}"


def states(jobs: Iterable[str]) -> tuple[dict[str, JobState], list[str]]:
    """(state by job id, such as 12 or 12_3; notes) of jobs and of every task of array jobs.

    The queue is asked first, then accounting for what has left it. Where one of them does not answer, a note says so
    and the others stand in.
    """
    ids = _ids(jobs)
    if not ids:
        return {}, []
    notes: list[str] = []
    found: dict[str, JobState] = {}
    try:
        found |= _queue(ids, patience_s=0)
    except ClusterError as error:
        notes.append(str(error))
    told = _ask(["sacct", "-n", "-P", "-X", "-j", ",".join(ids), "-o", "JobID%40,State%30,NodeList%200,ExitCode"])
    if told is None or told.returncode:
        why = words_of(told) if told else "not on PATH"
        notes.append(f"sacct does not answer ({why}): states are of squeue, scontrol and the members' own files")
        for number in ids:
            found |= {job: state for job, state in _controller(number).items() if job not in found or state.code}
    else:
        accounted = _parsed(told.stdout, ("id", "state", "node", "code"))
        answered = not notes
        for job, state in accounted.items():
            # accounting lags behind the queue, and may never hear of the end of what the queue has forgotten
            if state.active and answered:
                found.setdefault(job, JobState("UNKNOWN", "", state.node, state.code))
            elif job not in found or not found[job].active:
                found[job] = state
    return found, notes


def live(jobs: Iterable[str], folder: Path | None = None) -> set[str]:
    """Those of these jobs and array tasks that wait or run, with a `folder` only those that work there (what a file
    names may be anybody's job); raises ClusterError where the queue does not answer.
    """
    wanted = set(jobs)
    found = {job: state for job, state in _queue(_ids(wanted), PATIENCE_S).items() if job in wanted and state.active}
    place = os.path.realpath(folder or "")
    return {job for job, state in found.items() if not folder or os.path.realpath(state.folder) == place}


def _ids(jobs: Iterable[str]) -> list[str]:
    """The numbers that SLURM's programs take: one of each array."""
    return sorted({job.split("_")[0] for job in jobs}, key=int)


def _queue(ids: Sequence[str], patience_s: float) -> dict[str, JobState]:
    """What the queue knows of jobs and every task of arrays; raises ClusterError where it does not answer."""
    if not ids:
        return {}
    done = call(["squeue", "-h", "-r", "-a", "-t", "all", "-j", ",".join(ids), "-o", "%i|%T|%r|%N|%Z"], patience_s)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise ClusterError(f"{SILENT} ({words_of(done)}): try again when the controller is back.")
    return _parsed(done.stdout, ("id", "state", "reason", "node", "folder"))


def _ask(words: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return call(words, patience_s=0)
    except ClusterError:
        return None


def _parsed(text: str, names: Sequence[str]) -> dict[str, JobState]:
    found: dict[str, JobState] = {}
    for line in text.splitlines():
        values = dict(zip(names, (part.strip() for part in line.split("|")), strict=False))
        state = values.get("state", "").split(" ")[0].rstrip("+")
        if not state:
            continue
        node = "" if values.get("node") in (None, "None assigned", "(null)") else values["node"]
        made = JobState(state, "" if values.get("reason") in (None, "None") else values["reason"], node,
                        values.get("code", ""), values.get("folder", ""))  # fmt: skip
        for job in expand(values["id"]):
            found[job] = made
    return found


def expand(job: str) -> list[str]:
    """12_[0-2,5%3] as 12_0, 12_1, 12_2, 12_5; any other id as itself."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", job)
    if not match:
        return [job]
    numbers: list[int] = []
    for part in match.group(2).split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return [f"{match.group(1)}_{n}" for n in numbers]


def _controller(job: str) -> dict[str, JobState]:
    """What the controller still remembers of a job and its tasks."""
    told = _ask(["scontrol", "-o", "show", "job", job])
    found: dict[str, JobState] = {}
    for line in (told.stdout if told else "").splitlines():
        values = dict(pair.split("=", 1) for pair in line.split() if "=" in pair)
        if "JobState" not in values:
            continue
        task = values.get("ArrayTaskId", "")
        name = f"{values['ArrayJobId']}_[{task}]" if "-" in task or "," in task else (
            f"{values['ArrayJobId']}_{task}" if task else values.get("JobId", ""))  # fmt: skip
        node = values.get("NodeList", "")
        state = JobState(values["JobState"], values.get("Reason", ""), "" if node == "(null)" else node,
                         values.get("ExitCode", ""))  # fmt: skip
        found |= dict.fromkeys(expand(name), state)
    return found


def memory_ended(state: JobState) -> bool:
    """Whether a job was killed outright, which is what happens to one that takes too much memory."""
    return state.state == "OUT_OF_MEMORY" or (state.state == "FAILED" and state.code in ("0:9", "9:0", "137:0"))


def why_ended(state: JobState) -> str:
    """A job's end that it could not tell of itself, in words."""
    if memory_ended(state):
        return f"killed, most likely out of memory (SLURM: {state.state} {state.code})"
    words = {"TIMEOUT": "ended by the time limit", "CANCELLED": "cancelled", "NODE_FAIL": "its node failed",
             "PREEMPTED": "preempted and not requeued"}  # fmt: skip
    if state.state in words:
        return f"{words[state.state]} (SLURM: {state.state})"
    where = f" on {state.node}" if state.node else ""
    return f"ended{where} without a word (SLURM: {state.state}{' ' + state.code if state.code else ''})"


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs with all their tasks; raises ClusterError in SLURM's words."""
    ids = _ids(jobs)
    if ids:
        done = call(["scancel", *ids])
        if done.returncode:
            raise ClusterError(f"scancel refuses: {words_of(done)}.")


def config(key: str) -> str:
    """A value of the controller's configuration; "" where it does not tell."""
    done = _ask(["scontrol", "show", "config"])
    match = re.search(rf"^{key}\s*=\s*(\S+)", done.stdout if done else "", re.MULTILINE)
    return match.group(1) if match else ""


def partition(name: str) -> dict[str, str]:
    """What the controller says of a partition; raises ClusterError in SLURM's words."""
    done = call(["scontrol", "-a", "-o", "show", "partition", name])  # hidden ones, too
    if done.returncode:
        raise ClusterError(words_of(done))
    return dict(pair.split("=", 1) for pair in done.stdout.split() if "=" in pair)


def nodes_away(name: str) -> int:
    """How many nodes of a partition are down, drained or in maintenance; 0 where SLURM does not tell."""
    done = _ask(["sinfo", "-h", "-t", "down,drained,draining,maint", "-o", "%D", *(["-p", name] if name else [])])
    lines = done.stdout.split() if done and done.returncode == 0 else []
    return sum(int(line) for line in lines if line.isdigit())


def longest(name: str) -> str:
    """The longest time that a partition allows, at most a day."""
    limit = partition(name.split(",")[0]).get("MaxTime", "UNLIMITED") if name else "UNLIMITED"
    return "24:00:00" if limit == "UNLIMITED" or re.match(r"\d+-", limit) else limit


def node_kinds(name: str) -> tuple[int, int]:
    """(CPUs, GPUs) of the smallest node of a partition; where some nodes have GPUs, of the smallest of those."""
    done = call(["sinfo", "-h", "-N", "-o", "%c|%G", *(["-p", name] if name else [])])
    kinds = set()
    for line in done.stdout.splitlines():
        cpus, _, gres = line.partition("|")
        counts = re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", gres)
        kinds.add((int(re.sub(r"\D", "", cpus) or 1), sum(map(int, counts))))
    return min({kind for kind in kinds if kind[1]} or kinds, default=(1, 0))
