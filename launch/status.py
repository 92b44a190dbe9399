"""Where a sweep stands: `status.py DIR`, or `status.py DIR --watch` to look again and again."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from medlaunch.plan import read_plan
from medlaunch.report import HEAD, counts, latest, read_jobs, standings
from medslurm import commands
from medtrain.errors import UserError, exit_code
from medtrain.lock import holder
from medtrain.processes import end_on_signals
from medtrain.tables import to_markdown
from medtrain.wording import printable

CLEAR = "\033[2J\033[H"


def screen(out: Path, *, files_only: bool = False) -> str:
    """The table, the failures with their reasons, the cluster's own jobs, and notes."""
    plan = read_plan(out)
    jobs = read_jobs(out)
    states, notes = ({}, []) if files_only or not jobs else commands.states(job.job for job in jobs)
    members = standings(out, plan, states)
    shown = [m.cells() for m in members]
    kept = [n for n, name in enumerate(HEAD) if name in HEAD[:2] or any(line[n] for line in shown)]
    text = to_markdown([[line[n] for n in kept] for line in [list(HEAD), *shown]])
    told = [f"{m.label}: {m.state}: {m.reason}" for m in members if m.reason]
    for kind, words in (("prepare", "preparation"), ("finish", "final job")):
        job = latest(jobs, kind).get("")
        if job and job.job in states:
            state = states[job.job]
            told.append(f"{words} {job.job}: {state.state}{f' ({state.reason})' if state.reason else ''}")
    held = holder(out)
    if held:
        words = "left behind by" if held["stale"] else "held by"
        told.append(f"lock: {words} {held['user']} on {held['host']}, process {held['pid']}, {held['doing']}")
    lines = [text, f"{out}: {counts(members)}", *told, *(f"note: {note}" for note in notes)]
    return printable("\n".join(lines), keep="\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path, help="folder that launch/sweep.py wrote")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=10.0, metavar="SECONDS", help="look again until stopped"
    )
    parser.add_argument("--files-only", action="store_true", help="do not ask SLURM")
    options = parser.parse_args(argv)
    if options.watch is not None and not options.watch > 0:
        raise UserError(f"--watch {options.watch:g}: give seconds above 0.")
    end_on_signals()
    while True:
        text = screen(options.sweep, files_only=options.files_only)
        if options.watch is None:
            print(text)
            return 0
        clear = CLEAR if sys.stdout.isatty() else ""
        print(f"{clear}{time.strftime('%Y-%m-%d %H:%M:%S')}\n\n{text}", flush=True)
        time.sleep(options.watch)


if __name__ == "__main__":
    sys.exit(exit_code(main))
