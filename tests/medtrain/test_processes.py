"""Killed in whatever way, training leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_helpers import ROOT

from medtrain.processes import remove_dead_semaphores


def children(pid: int) -> list[int]:
    """The process and everything below it, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        grown, found = bool(more), found | more
    return sorted(found)


@pytest.mark.parametrize(("number", "group", "early"), [
    *((number, group, False) for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT) for group in (False, True)),
    (signal.SIGINT, True, True),
])  # fmt: skip
def test_no_orphans(cache: Path, tmp_path: Path, number: signal.Signals, group: bool, early: bool) -> None:
    """`group` signals every process at once, as a terminal and SLURM do; `early` while the loader's processes start."""
    command = [sys.executable, str(ROOT / "launch/train.py"), "brats_segresnet_demo", "--cache", str(cache), "--out",
               str(tmp_path / "run"), "--set", "data.crop=32,32,32", "--set", "data.spacing_mm=0", "--set",
               "train.epochs=500", "--set", "train.log_every=1", "--set", "train.workers=2"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if len(children(process.pid)) >= 3 if early else metrics.exists() and metrics.stat().st_size:
                break
            time.sleep(0.05)
        assert early or metrics.stat().st_size
        family = children(process.pid)
        assert len(family) >= 3
        (os.killpg if group else os.kill)(process.pid, number)
        _, error = process.communicate(timeout=120)
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert b"interrupted; the same command goes on" in error
        assert b"Traceback" not in error
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in family) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]


def test_processes_started_while_signals_wait_never_get_them() -> None:
    code = """
import os, signal, subprocess, sys
from medtrain.processes import signals_wait
child = "import time; print('up', flush=True); time.sleep(1)"
try:
    with signals_wait():
        started = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
        started.stdout.readline()
        os.killpg(0, signal.SIGINT)
        print("inside", started.wait())
except KeyboardInterrupt:
    print("after")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
                          start_new_session=True)  # fmt: skip
    assert done.stdout.split() == ["inside", "0", "after"], done.stderr


WATCHED = """
import multiprocessing, sys, time
from medtrain.errors import Failed
from medtrain.processes import Watch
worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
if __name__ == "__main__":
    Watch.GRACE_S = 1.0
    worker.start()
    watch = Watch([worker])
    with watch.waiting():
        worker.kill() if sys.argv[1] == "while it waits" else None
        time.sleep(30 if sys.argv[1] == "while it waits" else 0)
    worker.kill()
    time.sleep(3)  # a step, in which it waits for no worker
    try:
        with watch.waiting():
            time.sleep(30)
    except Failed as error:
        print("told:", error)
"""


@pytest.mark.parametrize("when", ["while it waits", "in a step"])
def test_a_dead_worker_is_never_waited_for(tmp_path: Path, when: str) -> None:
    (tmp_path / "watched.py").write_text(WATCHED)
    done = subprocess.run([sys.executable, str(tmp_path / "watched.py"), when], capture_output=True, text=True,
                          timeout=25, check=False)  # fmt: skip
    words = "a loader process of rank 0 ended by signal 9 (9: often for memory): lower train.workers\n"
    if when == "in a step":
        assert (done.returncode, done.stdout) == (0, f"told: {words}"), done.stderr
    else:
        assert (done.returncode, done.stderr) == (1, f"error: {words}")


def test_semaphores_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f"sem.loky-{dead.pid}-abc", f"sem.loky-{os.getpid()}-abc", "sem.mp-abc", "other"):
        (tmp_path / name).touch()
    remove_dead_semaphores(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", f"sem.loky-{os.getpid()}-abc", "sem.mp-abc"]
