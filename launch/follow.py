"""Follow a submitted sweep to its end: a line whenever a member changes, the table at last."""

import time
from pathlib import Path
from typing import Any

from medlaunch.options import DOORS
from medlaunch.plan import read_plan
from medlaunch.report import Standing, counts, latest, read_jobs, standings
from medslurm import commands
from medtrain.errors import UserError
from medtrain.files import read_json

# How long the final job may be gone from the queue without a file of it being seen: network file systems lag.
GRACE_S = 60.0


def follow(out: Path, every_s: float = 10.0) -> int:
    """Wait for the final job of the newest submission; returns 0, or 3 where members are missing. Raises UserError
    where the final job failed or ended without a word.
    """
    plan = read_plan(out)
    jobs = read_jobs(out)
    if "" not in latest(jobs, "finish"):
        raise UserError(f"{out} was not submitted to a cluster: run launch/sweep.py with --cluster.")
    final = latest(jobs, "finish")[""].job
    ids = [job.job for job in jobs]
    before: dict[str, str] = {}
    noted: set[str] = set()
    gone_since: float | None = None
    while True:
        states, notes = commands.states(ids)
        for note in notes:
            if note not in noted:
                print(f"note: {note}", flush=True)
                noted.add(note)
        members = standings(out, plan, states)
        before = _say_changes(members, before)
        path = out / "finish.json"
        told: dict[str, Any] = read_json(path) if path.is_file() else {}
        if told.get("job") == final:
            break
        ended = final in states and not states[final].active
        gone_since = (gone_since or time.monotonic()) if ended else None
        if gone_since and time.monotonic() - gone_since > GRACE_S:
            why = commands.why_ended(states[final])
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
    print(f"\n{(out / 'table.md').read_text(encoding='utf-8')}")
    for name, what in DOORS[plan["task"]].OUTPUTS.items():
        print(f"{what + ':':12} {out / name}")
    print(f"{'curves:':12} tensorboard --logdir {out}", flush=True)


def _say_changes(members: list[Standing], before: dict[str, str]) -> dict[str, str]:
    now = {m.folder: f"{m.state}{' on ' + m.node if m.state == 'running' else ''}{': ' + m.reason if m.reason else ''}"
           for m in members}  # fmt: skip
    changed = [m for m in members if now[m.folder] != before.get(m.folder)]
    clock = time.strftime("%H:%M:%S")
    for member in changed[:20]:
        print(f"{clock} {member.label}: {now[member.folder]}", flush=True)
    if len(changed) > 20:
        print(f"{clock} and {len(changed) - 20} more", flush=True)
    if changed:
        print(f"{clock} {counts(members)}", flush=True)
    return now
