"""Where a sweep stands: every member from its own files, and from SLURM where it answers."""

import csv
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medslurm import commands
from medslurm.commands import JobState
from medslurm.local import last_error
from medtrain.errors import UserError
from medtrain.files import parse_json_text, write_json, write_text
from medtrain.progress import duration
from medtrain.run_folder import FAILED
from medtrain.tables import to_csv
from medtrain.wording import plain

JOBS = "jobs.csv"
COLUMNS = ("kind", "job", "folder", "log", "code")
SILENT_S = 900.0
# A file about one member is far smaller.
MOST_BYTES = 1 << 20
HEAD = ("member", "state", "SLURM", "step", "epoch", "left", "score", "restarts", "node", "log")


@dataclass(frozen=True)
class Submitted:
    """A line of jobs.csv: a job of kind prepare, train or finish; `folder` names the member."""

    kind: str
    job: str
    folder: str
    log: str
    code: str


def read_jobs(sweep: Path) -> list[Submitted]:
    """What was submitted for a sweep, oldest first; none where nothing was."""
    path = sweep / JOBS
    if not path.is_file():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
        jobs = [Submitted(*line) for line in lines[1:]]
        # they become arguments of SLURM's programs
        if tuple(lines[0]) != COLUMNS or not all(plain(cell) for line in lines for cell in line):
            raise ValueError
        if not all(re.fullmatch(r"(\d+(_\d+)?)?", job.job) for job in jobs):
            raise ValueError
        return jobs
    except (OSError, IndexError, TypeError, ValueError, csv.Error):
        raise UserError(f"{path} is damaged: take it from an intact copy, or remove it once no job runs.") from None


def add_jobs(sweep: Path, jobs: Sequence[Submitted]) -> None:
    """Add lines to jobs.csv."""
    everything = [*read_jobs(sweep), *jobs]
    write_text(sweep / JOBS, to_csv([COLUMNS, *([j.kind, j.job, j.folder, j.log, j.code] for j in everything)]))


def latest(jobs: Sequence[Submitted], kind: str) -> dict[str, Submitted]:
    """The newest job of each member (or of the sweep, under "")."""
    return {job.folder: job for job in jobs if job.kind == kind}


@dataclass(frozen=True)
class Standing:
    """One member: `state` is done, damaged, failed, running, requeued, waiting, lost, silent or not started."""

    label: str
    folder: str
    state: str
    slurm: str = ""
    waits: str = ""  # why it does not run, in SLURM's words
    step: int = 0
    total: int = 0
    epoch: float = 0.0
    left_s: float | None = None
    score: str = ""
    restarts: int = 0
    node: str = ""
    log: str = ""
    reason: str = ""

    def cells(self) -> list[str]:
        """As a line of the table under HEAD."""
        steps = f"{self.step}/{self.total}" if self.total else ""
        left = duration(self.left_s) if self.left_s is not None and self.state == "running" else ""
        slurm = f"{self.slurm} ({self.waits})" if self.waits else self.slurm
        return [self.label, self.state, slurm, steps, f"{self.epoch:.1f}" if self.total else "", left, self.score,
                str(self.restarts or ""), self.node, self.log]  # fmt: skip


def standings(sweep: Path, plan: Mapping[str, Any], states: Mapping[str, JobState]) -> list[Standing]:
    """Every member of the plan, in its order; `states` may be empty, then the files alone speak."""
    jobs = latest(read_jobs(sweep), "train")
    return [_standing(sweep, member, jobs.get(member["folder"]), states) for member in plan["members"]]


def _standing(sweep: Path, member: Mapping[str, Any], submitted: Submitted | None,
              states: Mapping[str, JobState]) -> Standing:  # fmt: skip
    run = sweep / member["folder"]
    slurm = states.get(submitted.job) if submitted else None
    done, job = (_maybe(run / f"{name}.json") for name in ("done", "job"))
    # a thousand members are looked at again and again: what is done, or never began, is asked for no more
    settled = (done and not done.get("damaged")) or (slurm and slurm.active and slurm.state != "RUNNING" and not job)
    status, failed = ({}, {}) if settled else (_maybe(run / f"{name}.json") for name in ("status", "failed"))
    scores = done.get("scores") or status.get("scores") or {}
    name, value = next(iter(scores.items()), ("", 0.0))
    log = job.get("log") or (submitted.log if submitted else "")
    age = max(0.0, time.time() - status.get("time", 0))  # the clocks of two machines differ, and are set
    state, reason = _state(slurm, status, job, done, failed, age)
    if state == "lost" and slurm and slurm.state == "FAILED" and not commands.memory_ended(slurm):
        reason = _last_words(sweep, log) or reason
    waits = slurm.reason if slurm and slurm.active and slurm.state != "RUNNING" else ""
    left = status.get("left_s")
    return Standing(
        label=member["label"], folder=member["folder"], state=state,
        slurm=slurm.state if slurm else "", waits=waits, step=done.get("steps") or status.get("step", 0),
        total=done.get("steps") or status.get("total", 0), epoch=done.get("epochs") or status.get("epoch", 0.0),
        left_s=max(0.0, left - age) if left is not None else None, score=f"{name} {value:.3f}" if name else "",
        restarts=max(0, job.get("starts", 1) - 1),
        node=(slurm.node if slurm and slurm.node else ",".join(job.get("nodes", []))), reason=reason,
        log=log.removeprefix(f"{sweep.absolute()}/"),
    )  # fmt: skip


def _maybe(path: Path) -> dict[str, Any]:
    # opened, not asked for first: a thousand members are read from a network file system
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_BYTES)
    except OSError:
        return {}
    try:
        value = parse_json_text(text.decode("utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        return {"damaged": True}
    return {key: item for key, item in value.items() if _fits(key, item)}


# Types of what is shown; what is of another type is left out.
KINDS: dict[str, Any] = {"step": int, "total": int, "steps": int, "starts": int, "epoch": int | float,
                         "epochs": int | float, "time": int | float, "left_s": int | float | None, "scores": dict,
                         "log": str, "nodes": list, "reason": str, "left": str}  # fmt: skip


def _fits(key: str, item: Any) -> bool:
    if key == "scores" and isinstance(item, dict):
        return all(isinstance(value, int | float) for value in item.values())
    if key == "nodes" and isinstance(item, list):
        return all(isinstance(value, str) for value in item)
    return isinstance(item, KINDS.get(key, object)) and (not isinstance(item, float) or math.isfinite(item))


def _state(slurm: JobState | None, status: dict[str, Any], job: dict[str, Any], done: dict[str, Any],
           failed: dict[str, Any], age: float) -> tuple[str, str]:  # fmt: skip
    if done.get("damaged"):
        return "damaged", "its done.json is no JSON object: remove it, and run the sweep again"
    if done:
        return "done", ""
    if slurm and slurm.active:
        if slurm.state == "RUNNING":
            silent = status and age > SILENT_S
            return "running", f"no word from it for {duration(age)}" if silent else ""
        return ("requeued" if job else "waiting"), str(job.get("left", ""))
    if failed:
        return "failed", str(failed.get("reason", ""))
    if slurm:
        return "lost", commands.why_ended(slurm)
    if status and age < SILENT_S:
        return "running", ""
    if status or job:
        return "silent", f"no word from it for {duration(age)}" if status else "no word from it"
    return "not started", ""


def _last_words(sweep: Path, log: str) -> str:
    if not Path(log).is_file() or not Path(os.path.realpath(log)).is_relative_to(os.path.realpath(sweep)):
        return ""  # what a file of the sweep names may lie anywhere
    try:
        with open(log, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 20_000))
            text = file.read().decode("utf-8", "replace")
        text = text.rsplit("Starting with JobEnvironment", 1)[-1]  # an earlier start's errors are past
        shells = re.findall(r"^(?:error: .*|.*(?:not found|No such file or directory))$", text, re.MULTILINE)
        return last_error(text) or (shells[-1].removeprefix("error: ").strip()[:200] if shells else "")
    except OSError:
        return ""


def settle(sweep: Path, plan: Mapping[str, Any]) -> None:
    """Write failed.json for members that ended without one, so that the tables give a reason."""
    jobs = read_jobs(sweep)
    states, _ = commands.states(job.job for job in jobs)
    first = latest(jobs, "prepare").get("")
    told = any((sweep / name).is_file() for name in ("prepared.json", "prepare_failed.json"))
    if first and not told and first.job in states and not states[first.job].active:  # killed without a word
        why = f"its job {first.job} {commands.why_ended(states[first.job])}"
        write_json(sweep / "prepare_failed.json", {"status": "failed", "reason": why, "user": True})
    prepare = _maybe(sweep / "prepare_failed.json")
    for standing in standings(sweep, plan, states):
        if standing.state in ("done", "failed", "running", "requeued"):
            continue
        reason = standing.reason or "it never reported"
        if prepare and standing.restarts == 0 and not standing.step:
            reason = f"the data could not be prepared: {prepare.get('reason')}"
        write_json(sweep / standing.folder / FAILED, {"status": "failed", "reason": reason[:300]})


def counts(members: Sequence[Standing]) -> str:
    """How many members are in which state, in words."""
    states = [member.state for member in members]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
