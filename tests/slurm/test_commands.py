"""States from squeue, sacct and scontrol, alone and together; refusals in SLURM's words."""

from pathlib import Path

import fake_slurm
import pytest

from medslurm import commands
from medslurm.commands import ClusterError, JobState, expand, states, why_ended

pytestmark = pytest.mark.slurm


def test_the_queue_speaks_for_what_moves_and_accounting_for_the_rest(slurm: Path) -> None:
    (slurm / "squeue.txt").write_text(
        "7_0|RUNNING|None|node1\n7_1|PENDING|JobArrayTaskLimit|\n7_2|COMPLETED|None|node2\n8|PENDING|Dependency|\n"
    )
    (slurm / "sacct.txt").write_text(
        "7_0|PENDING|None assigned|0:0\n7_2|COMPLETED|node2|0:0\n7_3|CANCELLED by 1000|node1|0:15\n"
        "7_[4-6%2]|PENDING|None assigned|0:0\n9|NODE_FAIL|node3|1:0\n"
    )
    found, notes = states(["7_0", "7_3", "8", "9"])
    assert notes == []
    assert found["7_0"] == JobState("RUNNING", "", "node1")
    assert found["7_1"].active
    assert found["7_1"].reason == "JobArrayTaskLimit"
    assert found["7_2"] == JobState("COMPLETED", "", "node2", "0:0")
    assert found["7_3"].state == "CANCELLED"
    assert not found["7_5"].active  # the queue has forgotten it, whatever accounting still believes
    assert "node failed" in why_ended(found["9"])
    asked = fake_slurm.calls(slurm, "squeue")
    assert len(asked) == 1
    assert "7,8,9" in asked[0]


def test_without_accounting_the_controller_stands_in_with_a_note(slurm: Path) -> None:
    (slurm / "squeue.txt").write_text("7_0|RUNNING|None|node1\n")
    (slurm / "scontrol_job.txt").write_text(
        "JobId=12 ArrayJobId=7 ArrayTaskId=1 JobName=a b JobState=FAILED Reason=X ExitCode=0:9 NodeList=node2\n"
        "JobId=7 ArrayJobId=7 ArrayTaskId=2-3%1 JobState=PENDING Reason=Priority ExitCode=0:0 NodeList=(null)\n"
    )
    found, notes = states(["7_0", "7_1", "7_2", "7_3"])
    assert len(notes) == 1
    assert "sacct does not answer" in notes[0]
    assert found["7_0"].state == "RUNNING"
    assert found["7_1"] == JobState("FAILED", "X", "node2", "0:9")
    assert "out of memory" in why_ended(found["7_1"])
    assert found["7_3"].state == "PENDING"


def test_no_answer_is_not_none(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commands.live([]) == set()
    (slurm / "squeue.txt").write_text("7_0|RUNNING|None|node1\n7_1|COMPLETED|None|node1\n")
    assert commands.live(["7_0", "7_1", "8"]) == {"7_0"}
    (slurm / "squeue.txt").unlink()
    with pytest.raises(ClusterError, match="squeue does not answer"):
        commands.live(["7_0"])


def test_nothing_answers(slurm: Path) -> None:
    found, notes = states(["7"])
    assert found == {}
    assert len(notes) == 2
    assert states([]) == ({}, [])


def test_a_controller_that_restarts_is_waited_for(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands.time, "sleep", lambda seconds: None)
    (slurm / "down").write_bytes(b"xx")
    assert commands.partition("gpu")["MaxTime"] == "1-00:00:00"
    assert len(fake_slurm.calls(slurm, "scontrol")) == 3
    with pytest.raises(ClusterError, match="Invalid partition name"):
        commands.partition("absent")


def test_no_slurm_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="not on PATH: type this on a login node"):
        commands.call(["sbatch"])


def test_ids_of_arrays() -> None:
    assert expand("12_[0-2,5%3]") == ["12_0", "12_1", "12_2", "12_5"]
    assert expand("12_[7]") == ["12_7"]
    assert expand("12_3") == ["12_3"]
    assert expand("12") == ["12"]


@pytest.mark.parametrize(
    ("state", "words"),
    [("OUT_OF_MEMORY", "out of memory"), ("TIMEOUT", "time limit"), ("PREEMPTED", "not requeued"),
     ("COMPLETED", "without a word (SLURM: COMPLETED 0:0)")],
)  # fmt: skip
def test_ends_in_words(state: str, words: str) -> None:
    assert words in why_ended(JobState(state, "", "node1", "0:0"))


def test_cancel(slurm: Path) -> None:
    commands.cancel(["7_0", "7_1", "9"])
    assert fake_slurm.calls(slurm, "scancel") == [["7", "9"]]


def test_a_state_that_is_not_known_is_of_a_job_that_lives(slurm: Path) -> None:
    (slurm / "squeue.txt").write_text("7_0|RESV_DEL_HOLD|ReservationDeleted|\n7_1|FAILED|None|node1\n")
    assert commands.live(["7_0", "7_1"]) == {"7_0"}
