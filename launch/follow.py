"""Follow a submitted sweep to its end: a line whenever a member changes, the table at last."""

import time
from pathlib import Path
from typing import Any

from medlaunch.plan import read_plan
from medlaunch.report import Standing, counts, latest, read_jobs, standings
from medlaunch.tasks import DOORS
from medslurm import commands
from medslurm.commands import JobState
from medtrain.errors import UserError
from medtrain.files import read_json
from medtrain.wording import printable

# How long the final job may be gone from the queue without a file of it being seen: network file systems lag.
GRACE_S = 60.0
# Between two looks: many users who follow at once must not slow the controller down.
EVERY_S = 30.0


def follow(out: Path, every_s: float = EVERY_S) -> int:
    """Wait for the final job of the newest submission; returns 0, or 3 where members are missing. Raises UserError
    where the final job failed or ended without a word.
    """
    plan = read_plan(out)
    jobs = read_jobs(out)
    if "" not in latest(jobs, "finish"):
        raise UserError(f"{out} was not submitted to a cluster: run launch/sweep.py with --cluster.")
    before: dict[str, str] = {}
    noted: set[str] = set()
    gone_since: float | None = None
    while True:
        jobs = read_jobs(out)  # --resume elsewhere may have submitted another final job
        final, ids = latest(jobs, "finish")[""].job, [job.job for job in jobs]
        states, notes = commands.states(ids)
        others = {kind: latest(jobs, kind).get("") for kind in ("prepare", "finish")}
        notes += [waiting_words(kind, states.get(job.job)) for kind, job in others.items() if job]
        for note in filter(None, notes):
            if note not in noted:
                print(f"note: {note}", flush=True)
                noted.add(note)
        members = standings(out, plan, states)
        before = _say_changes(members, before)
        path = out / "finish.json"
        told: dict[str, Any] = read_json(path) if path.is_file() else {}
        if told.get("job") == final:
            break
        blind = any(note.startswith(commands.SILENT) for note in notes)
        ended = not blind and not (final in states and states[final].active)
        gone_since = (gone_since or time.monotonic()) if ended else None
        if gone_since and time.monotonic() - gone_since > GRACE_S:
            why = commands.why_ended(states[final]) if final in states else "is no longer known to SLURM"
            raise UserError(f"the final job {final} {why} and left nothing in {out}: can the nodes write there?")
        time.sleep(every_s)
    if told["status"] != "done":
        if told.get("user"):
            raise UserError(told["reason"])
        raise RuntimeError(f"the final job failed ({told['reason']}): see {latest(jobs, 'finish')[''].log}")
    show_table(out, plan)
    return 3 if told["missing"] else 0


def show_table(out: Path, plan: dict[str, Any]) -> None:
    """Print the sweep's table and where its files are."""
    print(printable(f"\n{(out / 'table.md').read_text(encoding='utf-8')}", keep="\n"))
    for name, what in DOORS[plan["task"]].OUTPUTS.items():
        print(f"{what + ':':12} {out / name}")
    print(f"{'curves:':12} tensorboard --logdir {out}", flush=True)


# Reasons why a job waits that pass by themselves.
USUAL = {"", "BeginTime", "Dependency", "JobArrayTaskLimit", "Priority", "Resources"}


def _words(member: Standing) -> str:
    where = f" on {member.node}" if member.state == "running" else ""
    told = f": {member.slurm} ({member.waits})" if member.waits not in USUAL else ""
    if "held" in member.waits.lower():
        told += ", ask the cluster's staff or `scontrol release`"
    return f"{member.state}{where}{told}{': ' + member.reason if member.reason else ''}"


def waiting_words(kind: str, state: JobState | None) -> str:
    """What to say of a job that is no member's and waits for something that may never come; else no words."""
    if state is None or state.state != "PENDING" or state.reason in USUAL:
        return ""
    return f"the {kind} job waits ({state.reason}): look with `scontrol show job`"


def _say_changes(members: list[Standing], before: dict[str, str]) -> dict[str, str]:
    now = {m.folder: _words(m) for m in members}
    changed = [m for m in members if now[m.folder] != before.get(m.folder)]
    clock = time.strftime("%H:%M:%S")
    for member in changed[:20]:
        print(printable(f"{clock} {member.label}: {now[member.folder]}"), flush=True)
    if len(changed) > 20:
        print(f"{clock} and {len(changed) - 20} more", flush=True)
    if changed:
        print(f"{clock} {counts(members)}", flush=True)
    return now
