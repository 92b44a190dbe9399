"""Stand-ins of SLURM's programs for fast tests: `install(folder)` makes a bin folder of them.

They answer from files that a test writes beside it (squeue.txt, sacct.txt, scontrol_job.txt, refuse.txt,
refuse_test.txt for --test-only alone, refuse_requeue.txt) and note every call in calls.jsonl, its environment in
environment.jsonl; a file `down` makes them fail as when the controller is down, once for each byte in it.
"""

import json
import os
import re
import stat
import sys
from pathlib import Path

PROGRAMS = ("sbatch", "squeue", "sacct", "scontrol", "scancel", "sinfo", "srun")


def install(folder: Path) -> Path:
    """Write the programs; returns the folder for PATH."""
    place = folder / "bin"
    place.mkdir(parents=True)
    for name in PROGRAMS:
        script = place / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{folder}" {name} "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return place


def calls(folder: Path, program: str) -> list[list[str]]:
    """The arguments of every call of a program."""
    path = folder / "calls.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [words[1:] for words in lines if words[0] == program]


def environment(folder: Path, program: str) -> dict[str, str]:
    """What the last call of a program saw."""
    lines = [json.loads(line) for line in (folder / "environment.jsonl").read_text().splitlines()]
    return dict([seen for name, seen in lines if name == program][-1])


def scripts(folder: Path) -> list[str]:
    """What sbatch was given, in order."""
    return [path.read_text() for path in sorted(folder.glob("script_*.sh"))]


def fail(words: str) -> int:
    """Say it as SLURM does."""
    print(words, file=sys.stderr)
    return 1


def sbatch(folder: Path, words: list[str]) -> int:
    """Take a job, or refuse it in the words of refuse.txt."""
    refuse = folder / "refuse.txt"
    if refuse.exists():
        return fail(f"sbatch: error: {refuse.read_text()}")
    if "--test-only" in words:
        test = folder / "refuse_test.txt"
        return fail(f"sbatch: error: {test.read_text()}") if test.exists() else 0
    number = 100 + len(list(folder.glob("script_*.sh")))
    last = folder / "last.txt"  # of those that the site's limit allows
    if last.exists() and number > int(last.read_text()):
        return fail("sbatch: error: QOSMaxSubmitJobPerUserLimit")
    (folder / f"script_{number}.sh").write_text(Path(words[-1]).read_text())
    print(f"Submitted batch job {number}")
    return 0


def scontrol(folder: Path, words: list[str]) -> int:
    """Partitions, the configuration, jobs, requeue."""
    if words[:1] == ["requeue"]:
        refuse = folder / "refuse_requeue.txt"
        return fail(refuse.read_text()) if refuse.exists() else 0
    if words[:1] == ["update"]:
        return 0
    kind = words[words.index("show") + 1]
    if kind == "partition":
        if words[-1] == "absent" or (words[-1] == "hidden" and "-a" not in words):
            return fail("slurm_load_partitions: Invalid partition name specified")
        print(f"PartitionName={words[-1]} MaxTime=1-00:00:00 State=UP")
    elif kind == "config":
        most = folder / "max_array.txt"
        print(f"MaxArraySize            = {most.read_text() if most.exists() else 1001}")
    elif kind == "job":
        told = folder / "scontrol_job.txt"
        print(told.read_text() if told.exists() else "")
    return 0


def answer(folder: Path, name: str) -> int:
    """Print the file of a program, or fail as where there is none."""
    path = folder / f"{name}.txt"
    if not path.exists():
        return fail(f"{name}: error: slurm_persist_conn_open_without_init: failed to open persistent connection")
    print(path.read_text(), end="")
    return 0


def main() -> int:
    """One call of one program."""
    folder, name, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    with open(folder / "calls.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps([name, *words]) + "\n")
    with open(folder / "environment.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps([name, dict(os.environ)]) + "\n")
    down = folder / "down"
    if down.exists() and down.stat().st_size:
        down.write_bytes(down.read_bytes()[1:])
        return fail(f"{name}: error: Unable to contact slurm controller (connect failure)")
    if name == "sbatch":
        return sbatch(folder, words)
    if name == "scontrol":
        return scontrol(folder, words)
    if name in ("squeue", "sacct", "sinfo"):
        return answer(folder, name)
    return 0


def array_of(script: str) -> str:
    """The --array of a script; "" where it has none."""
    found = re.search(r"^#SBATCH --array=(\S+)", script, re.MULTILINE)
    return found.group(1).strip("'") if found else ""


if __name__ == "__main__":
    sys.exit(main())
