"""Where members stand, from their files and from SLURM; what `status.py` shows; reasons for those that are silent."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launch_helpers import ROOT, run_main

from medlaunch import follow, report
from medlaunch.plan import Request, make_plan, write_plan
from medlaunch.report import Submitted, add_jobs, settle, standings
from medslurm.commands import JobState
from medtrain.errors import UserError, exit_code

NAMES = ("done", "failed", "lost", "running", "requeued", "waiting", "silent", "fresh")


@pytest.fixture
def sweep(tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, JobState]]:
    """Eight members, each in another state; the plan; what SLURM says."""
    out = tmp_path / "sweep"
    request = Request(sweep="brats_demo", data="/data", models=("segresnet",), seeds=len(NAMES))
    plan = make_plan(request, request.recipes())
    write_plan(out, plan)
    folder = {name: out / member["folder"] for name, member in zip(NAMES, plan["members"], strict=True)}
    log = out / "jobs" / "7_2_0_log.out"
    log.parent.mkdir()
    log.write_text("Traceback\nRuntimeError: CUDA error: an illegal memory access\nsrun: error: x\n")
    add_jobs(out, [Submitted("prepare", "6", "", "", "c")])
    add_jobs(out, [Submitted("train", f"7_{n}", folder[name].name, str(out / "jobs" / f"7_{n}_0_log.out"), "c")
                   for n, name in enumerate(NAMES)])  # fmt: skip
    add_jobs(out, [Submitted("finish", "8", "", "", "c")])
    now = time.time()
    status = {"phase": "train", "step": 40, "total": 100, "epoch": 4.0, "scores": {"mean": 0.71}, "left_s": 3600}

    def put(name: str, file: str, value: dict[str, Any]) -> None:
        folder[name].mkdir(exist_ok=True)
        (folder[name] / file).write_text(json.dumps(value))

    put("done", "done.json", {"scores": {"mean": 0.83, "TC": 0.7}, "steps": 100, "epochs": 10})
    put("failed", "failed.json", {"reason": "FloatingPointError: the loss has been nan 3 times"})
    for name, age in (("running", 60), ("requeued", 60), ("silent", 5000), ("lost", 100)):
        put(name, "status.json", {**status, "time": now - age})
        put(name, "job.json", {"job": "x", "nodes": ["node4"], "starts": 3, "log": ""})
    states = {
        "7_0": JobState("COMPLETED", "", "node1", "0:0"), "7_1": JobState("FAILED", "", "node1", "1:0"),
        "7_2": JobState("FAILED", "", "node2", "1:0"), "7_3": JobState("RUNNING", "", "node3"),
        "7_4": JobState("PENDING", "BeginTime"), "7_5": JobState("PENDING", "Resources"),
        "8": JobState("PENDING", "Dependency"),
    }  # fmt: skip
    return out, plan, states


def test_every_state(sweep: tuple[Path, dict[str, Any], dict[str, JobState]]) -> None:
    out, plan, states = sweep
    found = dict(zip(NAMES, standings(out, plan, states), strict=True))
    told = {name: member.state for name, member in found.items()}
    assert told == {name: name if name != "fresh" else "not started" for name in NAMES}
    assert (found["done"].step, found["done"].total, found["done"].score) == (100, 100, "mean 0.830")
    assert "loss has been nan" in found["failed"].reason
    assert found["lost"].reason == "RuntimeError: CUDA error: an illegal memory access"
    running = found["running"]
    assert (running.step, running.total, running.score, running.restarts) == (40, 100, "mean 0.710", 2)
    assert running.node == "node3"
    assert running.left_s == pytest.approx(3540, abs=5)
    assert (found["waiting"].slurm, found["waiting"].waits) == ("PENDING", "Resources")
    assert "PENDING (Resources)" in found["waiting"].cells()
    assert "no word from it for 1 h 23 min" in found["silent"].reason
    assert "2 running" not in report.counts(list(found.values()))


def test_the_files_alone_tell_most(sweep: tuple[Path, dict[str, Any], dict[str, JobState]]) -> None:
    out, plan, _ = sweep
    told = [member.state for member in standings(out, plan, {})]
    assert told == ["done", "failed", "running", "running", "running", "not started", "silent", "not started"]


def test_a_member_that_runs_again_is_no_longer_failed(
    sweep: tuple[Path, dict[str, Any], dict[str, JobState]],
) -> None:
    out, plan, states = sweep
    again = {**states, "7_1": JobState("RUNNING", "", "node1")}
    assert standings(out, plan, again)[1].state == "running"


def test_the_screen(sweep: tuple[Path, dict[str, Any], dict[str, JobState]], capsys: pytest.CaptureFixture[str],
                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    out, _, states = sweep
    monkeypatch.setattr(report.commands, "states", lambda jobs: (states, ["sacct does not answer"]))
    assert run_main("status", out) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == list(report.HEAD)
    row = next(line for line in lines if "(seed 3)" in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2:6] == ["running", "RUNNING", "40/100", "4.0"]
    assert cells[6].startswith(("58 min", "59 min"))
    assert cells[7:9] == ["mean 0.710", "2"]
    assert "1 done, 1 failed, 1 lost, 1 running, 1 requeued, 1 waiting, 1 silent, 1 not started" in printed
    assert "final job 8: PENDING (Dependency)" in printed
    assert "note: sacct does not answer" in printed
    assert run_main("status", out, "--files-only") == 0
    assert "PENDING" not in capsys.readouterr().out


def test_watching_goes_on_until_it_is_stopped(sweep: tuple[Path, dict[str, Any], dict[str, JobState]]) -> None:
    out, _, _ = sweep
    words = [sys.executable, str(ROOT / "launch" / "status.py"), str(out), "--files-only", "--watch", "0.1"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen = 0
    while seen < 3:
        seen += "1 done, 1 failed" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in error


def test_the_final_job_gives_silent_members_a_reason(
    sweep: tuple[Path, dict[str, Any], dict[str, JobState]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plan, states = sweep
    ended = {**states, "7_5": JobState("CANCELLED", "", ""), "7_4": JobState("NODE_FAIL", "", "node9")}
    monkeypatch.setattr(report.commands, "states", lambda jobs: (ended, []))
    settle(out, plan)

    def reason(number: int) -> str:
        return str(json.loads((out / plan["members"][number]["folder"] / "failed.json").read_text())["reason"])

    assert reason(2) == "RuntimeError: CUDA error: an illegal memory access"
    assert "node failed" in reason(4)
    assert "cancelled" in reason(5)
    assert "never reported" in reason(7)
    assert "loss has been nan" in reason(1)
    assert not (out / plan["members"][3]["folder"] / "failed.json").exists()


@pytest.mark.parametrize(("log", "words"), [
    ("error: `module load cuda/13` failed on node7\nsrun: error: task 0: Exited\n", "`module load cuda/13` failed on"),
    ("slurm_script: line 9: exec: /v/bin/python: not found\n", "exec: /v/bin/python: not found"),
    ("error: SLURM does not requeue job 7_2 (disabled): --resume goes on\n", "does not requeue job 7_2"),
])  # fmt: skip
def test_a_shells_last_words_are_told(
    sweep: tuple[Path, dict[str, Any], dict[str, JobState]], log: str, words: str
) -> None:
    out, plan, states = sweep
    (out / "jobs" / "7_2_0_log.out").write_text(log)
    assert words in standings(out, plan, states)[2].reason


def test_what_may_wait_for_ever_is_told_while_following(
    sweep: tuple[Path, dict[str, Any], dict[str, JobState]],
) -> None:
    out, plan, states = sweep
    wait = {**states, "7_3": JobState("REQUEUE_HOLD", "launch failed requeued held"),
            "7_4": JobState("PENDING", "QOSMaxWallDurationPerJobLimit"),
            "7_5": JobState("PENDING", "Resources")}  # fmt: skip
    told = [follow._words(member) for member in standings(out, plan, wait)]
    assert (
        told[3] == "requeued: REQUEUE_HOLD (launch failed requeued held), ask the cluster's staff or `scontrol release`"
    )
    assert told[4] == "requeued: PENDING (QOSMaxWallDurationPerJobLimit)"
    assert told[5] == "waiting"
    assert follow.waiting_words("prepare", JobState("PENDING", "QOSMinGRES")).startswith(
        "the prepare job waits (QOSMin"
    )
    for state in (None, JobState("RUNNING"), JobState("PENDING", "Dependency")):
        assert follow.waiting_words("finish", state) == ""


def test_damaged_files_are_told_or_passed_over(
    sweep: tuple[Path, dict[str, Any], dict[str, JobState]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, plan, states = sweep
    (out / plan["members"][3]["folder"] / "status.json").write_text('{"step": ')
    assert standings(out, plan, states)[3].state == "running"
    (out / "jobs.csv").write_text("x\n")
    assert run_main("status", out) == 2
    assert "jobs.csv is damaged" in capsys.readouterr().err


def test_what_a_foreign_file_says_controls_no_terminal(
    sweep: tuple[Path, dict[str, Any], dict[str, JobState]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, plan, _ = sweep
    runs = [out / member["folder"] for member in plan["members"]]
    clipboard = "\x1b]52;c;ZXZpbA==\x07"
    (runs[1] / "failed.json").write_text(json.dumps({"reason": f"x{clipboard}\n| y"}))
    (runs[3] / "job.json").write_text(json.dumps({"nodes": [f"node{clipboard}"], "log": f"{clipboard}.out"}))
    (runs[0] / "done.json").write_text(json.dumps({"scores": {f"mean{clipboard}": 0.5}}))
    assert run_main("status", out, "--files-only") == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\\x1b]52" in printed
    (out / "table.md").write_text(f"| {clipboard} |\n")
    follow.show_table(out, plan)
    assert capsys.readouterr().out.startswith("\n| \\x1b]52;c;ZXZpbA==\\x07 |\n")


def test_a_sentence_controls_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: object) -> int:
        raise UserError("\x1b[2J is no\nname")

    assert exit_code(main) == 2
    assert capsys.readouterr().err == "error: \\x1b[2J is no name\n"
