"""What jobs leave behind: starts, failures, the words of the first rank that failed, members that never get on."""

import json
from pathlib import Path
from typing import Any, cast

import pytest

from medlaunch import jobs
from medlaunch.jobs import FinishJob, PrepareJob, TrainJob, note_failure, note_start, note_stuck, reason_of
from medlaunch.plan import Request, make_plan, write_plan
from medslurm.job import ThisJob
from medtrain.errors import NodeError, UserError


def job(restarts: int = 0, **values: Any) -> ThisJob:
    told = {"name": "7_1", "raw": "9", "rank": 0, "world": 1, "local_rank": 0, "local_world": 1, "node": "node1",
            "nodes": ("node1",), "restarts": restarts, **values}  # fmt: skip
    return ThisJob(**told)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def step(run: Path, number: int) -> None:
    (run / "status.json").write_text(json.dumps({"step": number, "phase": "train"}))


def test_starts_are_counted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for start in (1, 2):
        note_start(run, job(start))
        assert read(run / "job.json")["starts"] == start
    assert read(run / "job.json")["nodes"] == ["node1"]
    assert read(run / "job.json")["log"] == str(tmp_path / "jobs" / "7_1_0_log.out")


def test_a_member_that_gets_no_step_further_fails_at_last(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in (0, 5, 5, 9, 9):
        note_start(run, job())
        step(run, number)
        note_stuck(run, 0)
    for _ in range(4):  # preempted soon after each start: that is not counted
        note_start(run, job())
        note_stuck(run, 3600)
    note_start(run, job())
    note_stuck(run, 0)
    with pytest.raises(UserError, match="no step was made after step 9 in 3 whole times: give a longer --time"):
        note_start(run, job())
    assert "no step was made" in read(run / "failed.json")["reason"]
    note_start(run, job())  # submitted again, it has its chances anew


def test_the_first_rank_that_failed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "failed.json"
    monkeypatch.setenv("RANK", "3")
    note_failure(path, ValueError("bad crop\nmore"))
    monkeypatch.setenv("RANK", "0")
    note_failure(path, RuntimeError("Connection closed by peer"))
    assert read(path)["reason"] == "rank 3: ValueError: bad crop"
    assert reason_of(UserError("no such file: give one.")) == "no such file: give one."


def test_jobs_leave_the_reason_of_their_failure(tmp_path: Path) -> None:
    request = Request(sweep="brats_demo", data=str(tmp_path / "none"))
    write_plan(tmp_path, make_plan(request, request.recipes()))
    with pytest.raises(UserError):
        PrepareJob(str(tmp_path))()
    assert "none is not a folder" in read(tmp_path / "prepare_failed.json")["reason"]
    assert read(tmp_path / "prepare_failed.json")["user"]
    with pytest.raises(UserError):
        FinishJob(str(tmp_path), "equal")()
    assert "no finished member (brats_segresnet_demo: did not finish)" in read(tmp_path / "finish.json")["reason"]
    member = tmp_path / read(tmp_path / "plan.json")["members"][0]["folder"]
    member.mkdir()
    (member / "done.json").write_text("{}")
    with pytest.raises(UserError, match="is not there: start the sweep again"):
        FinishJob(str(tmp_path), "equal")()
    with pytest.raises(UserError):
        TrainJob("{}", "none.h5", str(tmp_path / "run"))._train()
    assert "no recipe of this program" in read(tmp_path / "run" / "failed.json")["reason"]


def test_a_member_that_was_requeued_after_its_last_word_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "node1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "done.json").write_text('{"status": "done"}')
    assert TrainJob("{}", "none.h5", str(tmp_path))() == {"status": "done"}
    assert not (tmp_path / "job.json").exists()


def test_a_job_that_asked_for_gpus_does_not_work_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("MEDTRAIN_ALLOW_CPU", raising=False)
    monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
    request = Request(sweep="brats_demo", data=str(tmp_path / "none"))
    write_plan(tmp_path, make_plan(request, request.recipes()))
    run = tmp_path / "run"
    with pytest.raises(UserError, match="gpu07 was asked for 2 GPUs"):
        TrainJob("{}", "none.h5", str(run), gpus=2)._train()
    assert "gpu07 was asked for 2 GPUs" in read(run / "failed.json")["reason"]
    with pytest.raises(UserError, match="gpu07 was asked for 1 GPU,"):
        FinishJob(str(tmp_path), "equal", gpus=1)()
    assert read(tmp_path / "finish.json")["user"]
    monkeypatch.setenv("MEDTRAIN_ALLOW_CPU", "1")
    with pytest.raises(UserError, match="no recipe of this program"):
        TrainJob("{}", "none.h5", str(run), gpus=2)._train()


def test_a_member_whose_node_lacks_gpus_is_started_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Job:
        name, raw, node, nodes, left = "810_2", "812", "gpu07", ("gpu07",), 0

        def leave_node(self) -> None:
            assert not (run / "failed.json").exists()
            assert read(run / "job.json")["left"] == "gpu07: GPU 0 can not be used (ECC)."
            self.left += 1

    def broken(asked: int) -> None:
        raise NodeError("gpu07: GPU 0 can not be used (ECC).")

    monkeypatch.setattr("medtrain.distributed.demand_gpus", broken)
    run, job = tmp_path / "run", Job()
    with pytest.raises(NodeError):
        TrainJob("{}", "none.h5", str(run), gpus=1)._train(lambda: False, cast(Any, job))
    assert job.left == 1
    assert "ECC" in read(run / "failed.json")["reason"]  # SLURM took it not elsewhere


def test_a_job_takes_no_more_cpus_than_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(128)))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert jobs.own_cpus() == 6
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    assert jobs.own_cpus() == 128
