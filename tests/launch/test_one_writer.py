"""One process trains in a run folder: a second is refused before it touches anything, a dead one blocks nobody."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY
from launch_helpers import ROOT, run_main, run_script

from medlaunch.jobs import TrainJob
from medseg.recipes import SegRecipe
from medslurm.job import ThisJob
from medtrain.lock import InUseError

HOLD = """
import sys, time
from pathlib import Path
from medlaunch.run import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1000)
"""
SETS = [part for item in TINY for part in ("--set", item)]


@contextlib.contextmanager
def training(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            yield other
        finally:
            other.kill()


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_a_second_process_is_refused_and_a_killed_first_one_is_followed(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ("train", "brats_segresnet_demo", "--cache", cache, "--out", run, *SETS)
    with training(run) as other:
        (run / f".{other.pid}-0123abcd.checkpoint_last.pt").write_bytes(b"half")  # what it is just writing
        before = state(run)
        assert run_main(*words) == 2
        told = capfd.readouterr().err
        assert told.count("\n") == 1
        assert f"error: {run} is in use: " in told
        assert f"(process {other.pid}) is training there; wait for that to end" in told
        assert state(run) == before
        other.send_signal(signal.SIGKILL)
    assert run_main(*words) == 0
    assert (run / "done.json").is_file()
    assert [path.name for path in run.iterdir() if path.name.startswith(".") or "lock" in path.name] == []


@pytest.mark.distributed
def test_ranks_of_a_second_launch_are_refused_together(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with training(run):
        before = state(run)
        done = run_script("train", "brats_segresnet_demo", "--cache", cache, "--out", run, *SETS, ranks=2)
        assert done.returncode == 1  # torchrun's own
        assert done.stderr.count("error: ") == 1, done.stderr
        assert f"error: {run} is in use: " in done.stderr
        assert state(run) == before
    done = run_script("train", "brats_segresnet_demo", "--cache", cache, "--out", run, *SETS, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (run / "done.json").is_file()


def test_a_job_that_is_refused_leaves_the_other_ones_files_alone(
    cache: Path, tiny: Callable[..., SegRecipe], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = ThisJob(name="7_1", raw="9", rank=0, world=1, local_rank=0, local_world=1, node="node1", nodes=("node1",),
                  restarts=0)  # fmt: skip
    with training(run):
        (run / "job.json").write_text('{"starts": 1, "nodes": ["node2"]}')
        (run / "failed.json").write_text("{}")
        before = state(run)
        with pytest.raises(InUseError, match="is in use"):
            TrainJob(tiny().to_json(), str(cache), str(run))._train(lambda: False, job)
        assert state(run) == before
    TrainJob(tiny().to_json(), str(cache), str(run))._train(lambda: False, job)
    assert {"done.json", "job.json"} <= set(os.listdir(run))
    assert not {"failed.json", "lock.json"} & set(os.listdir(run))
    assert '"starts": 2' in (run / "job.json").read_text()
