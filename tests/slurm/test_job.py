"""A job on its node: ranks, warnings, requeues; each in a process of its own, as handlers are the process's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_slurm
import pytest

from medslurm.job import patience, this_job

pytestmark = pytest.mark.slurm

RANKS = {
    "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "812", "SLURM_ARRAY_JOB_ID": "810", "SLURM_ARRAY_TASK_ID": "2",
    "SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURMD_NODENAME": "gpu04", "SLURM_RESTART_COUNT": "5",
}  # fmt: skip
LOOP = """
import sys, time
from medslurm.job import Warned, this_job
warned = Warned(this_job(), float(sys.argv[1]), stuck=lambda: print("stuck", flush=True))
print("listening", flush=True)
while not (warned() and sys.argv[2] == "steps"):
    time.sleep(0.05)
print("saved", warned.told, flush=True)
this_job().leave(warned.told)
"""
CUT = """
import time
from medslurm.job import restart_on_warning, this_job
restart_on_warning(this_job())
print("listening", flush=True)
time.sleep(60)
"""


def start(code: str, *arguments: str, rank: int = 0) -> subprocess.Popen[str]:
    environment = {**os.environ, **RANKS, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2)}
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True,
                               env=environment)  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    text, _ = process.communicate(timeout=120)
    return process.returncode, text


def test_ranks_come_from_slurms_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_job() is None
    for name, value in RANKS.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")  # so that what is exported is taken back
    job = this_job()
    assert job is not None
    assert (job.name, job.raw, job.node, job.nodes, job.restarts) == ("810_2", "812", "gpu04", ("gpu03", "gpu04"), 5)
    job.export_ranks()
    told = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")]
    assert told == ["3", "4", "1", "2", "gpu03"]
    assert not job.is_main
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    assert this_job() is None


def test_a_warning_is_answered_at_the_next_step_and_the_job_requeued(slurm: Path) -> None:
    process = start(LOOP, "30", "steps")
    process.send_signal(signal.SIGUSR2)
    code, text = ended(process)
    assert code == 0
    assert "saved warning" in text
    assert fake_slurm.calls(slurm, "scontrol") == [["requeue", "810_2"]]


@pytest.mark.parametrize(("code", "arguments"), [(LOOP, ("30", "steps")), (CUT, ())])
def test_a_requeue_that_is_refused_is_no_good_end(slurm: Path, code: str, arguments: tuple[str, ...]) -> None:
    """Or a job that waits for this one's success would start, and nobody would be told."""
    (slurm / "refuse_requeue.txt").write_text("Requested operation is presently disabled for job 810_2")
    process = start(code, *arguments)
    process.send_signal(signal.SIGUSR2)
    assert ended(process)[0] == 1


def test_other_ranks_leave_without_a_requeue(slurm: Path) -> None:
    process = start(LOOP, "30", "steps", rank=1)
    process.send_signal(signal.SIGUSR2)
    assert ended(process)[0] == 0
    assert fake_slurm.calls(slurm, "scontrol") == []


def test_a_cancelled_job_saves_and_is_not_requeued(slurm: Path) -> None:
    process = start(LOOP, "30", "steps")
    process.send_signal(signal.SIGTERM)
    code, text = ended(process)
    assert code == 143
    assert "saved end" in text
    assert fake_slurm.calls(slurm, "scontrol") == [["-o", "show", "job", "810_2"]]


def test_a_preemption_that_gives_no_warning_is_told_from_a_cancellation(slurm: Path) -> None:
    """In its grace time SLURM requeues no job that ends by itself."""
    (slurm / "scontrol_job.txt").write_text("JobId=812 JobState=RUNNING PreemptTime=2026-11-24T10:00:00 X=1\n")
    process = start(LOOP, "30", "steps")
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 0
    assert fake_slurm.calls(slurm, "scontrol")[1:] == [["requeue", "810_2"]]
    (slurm / "scontrol_job.txt").write_text("JobId=812 JobState=CANCELLED PreemptTime=None\n")
    process = start(LOOP, "30", "steps")
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143


def test_a_time_limit_whose_warning_was_missed_is_no_end(slurm: Path) -> None:
    (slurm / "scontrol_job.txt").write_text("JobId=812 JobState=COMPLETING Reason=TimeLimit PreemptTime=None X=1\n")
    process = start(LOOP, "30", "steps")
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 0
    assert fake_slurm.calls(slurm, "scontrol")[1:] == [["requeue", "810_2"]]


def test_other_ranks_never_end_the_job_before_rank_0_has_saved(slurm: Path) -> None:
    process = start(LOOP, "30", "steps", rank=1)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 0
    assert fake_slurm.calls(slurm, "scontrol") == []


def test_inside_a_container_the_batch_script_requeues(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medslurm.submit import after_srun

    folder = tmp_path / "it's jobs"
    folder.mkdir()
    (slurm / "bin" / "scontrol").unlink()
    monkeypatch.setenv("PATH", str(slurm / "bin"))
    monkeypatch.setenv("SUBMITIT_FOLDER", str(folder))
    process = start(CUT)
    process.send_signal(signal.SIGUSR2)
    assert ended(process)[0] == 0
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    script = "\n".join(["scontrol() { echo asked $*; }", "(exit 7)", *after_srun(folder)])
    for told in ("asked requeue 810_2\n", ""):
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, check=False, env={**RANKS, "PATH": "/bin"}
        )
        assert (done.stdout, done.returncode) == (told, 7)


LEFT = """
from medslurm import job
from medslurm.job import this_job
job.UNTIL_ASKED_S = 0.1
print("listening", flush=True)
this_job().leave_node()
print("stays", flush=True)
"""


def test_a_node_that_lacks_what_was_asked_for_is_left(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the array's waiting tasks, which users' own exclusions keep; the third such node is not left."""
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    (slurm / "scontrol_job.txt").write_text("JobId=812 ArrayJobId=810 ReqNodeList=(null) ExcNodeList=gpu[11-12] X=1\n")
    for rank in range(2):  # one that is not the first of its node asks, too, where the first one did not
        assert ended(start(LEFT, rank=rank)) == (0, "requeued job 810_2\n")
    asked = [words for words in fake_slurm.calls(slurm, "scontrol") if words[0] != "-o"]
    assert asked == 2 * [["requeue", "810_2"], ["update", "JobId=810", "ExcNodeList=gpu[11-12],gpu04"]]
    assert ended(start(LEFT)) == (0, "stays\n")
    assert len(fake_slurm.calls(slurm, "scontrol")) == 6


def test_a_node_is_not_left_where_slurm_refuses(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    (slurm / "refuse_requeue.txt").write_text("Job may not be requeued")
    assert ended(start(LEFT)) == (0, "stays\n")
    assert not list(tmp_path.glob(".left-*"))


def test_a_job_that_reaches_no_step_is_requeued_all_the_same(slurm: Path) -> None:
    process = start(LOOP, "0.3", "never")
    process.send_signal(signal.SIGUSR2)
    code, text = ended(process)
    assert code == 0
    assert "stuck" in text
    assert fake_slurm.calls(slurm, "scontrol") == [["requeue", "810_2"]]


def test_requeueing_has_no_limit(slurm: Path) -> None:
    """submitit by itself gives up after three time limits."""
    for _ in range(5):
        process = start(CUT)
        process.send_signal(signal.SIGUSR2)
        assert ended(process)[0] == 0
    assert fake_slurm.calls(slurm, "scontrol") == [["requeue", "810_2"]] * 5


def test_a_controller_that_restarts_meanwhile_is_asked_again(slurm: Path) -> None:
    (slurm / "down").write_bytes(b"x")
    process = start(CUT)
    process.send_signal(signal.SIGUSR2)
    assert ended(process)[0] == 0
    assert fake_slurm.calls(slurm, "scontrol") == [["requeue", "810_2"]] * 2


def test_a_warning_before_python_listens_does_not_kill_the_job() -> None:
    from medslurm.submit import PATIENT_SHELL

    process = subprocess.Popen(["bash", "-c", f"exec {PATIENT_SHELL} sleep 1"])
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=60) == 0


def test_patience_is_less_than_slurms() -> None:
    assert patience(120) == 90
    assert patience(30) == 15
