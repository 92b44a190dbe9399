"""What a submission leaves when it is cut off, and how far a sweep's own files are trusted; SLURM is a stand-in."""

import csv
import errno
import json
import os
from pathlib import Path

import fake_slurm
import pytest
from launch_helpers import run_main

pytestmark = pytest.mark.slurm


def words(slurm: Path, data: Path, out: Path, *extra: object) -> list[object]:
    return ["sweep", "brats_demo", "--data", data, "--out", out, "--cluster", "lab", "--cluster-file",
            slurm / "clusters.toml", *extra]  # fmt: skip


def jobs(out: Path) -> list[dict[str, str]]:
    with open(out / "jobs.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_what_was_submitted_before_a_refusal_is_noted(
    slurm: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an array in parts, too."""
    out = tmp_path / "s"
    (slurm / "max_array.txt").write_text("2")
    (slurm / "last.txt").write_text("102")
    typed = words(slurm, phantoms, out, "--models", "segresnet", "--seeds", 5)
    assert run_main(*typed) == 2
    assert "What was submitted before that stays; once mended, --resume" in capsys.readouterr().err
    assert [job["job"] for job in jobs(out)] == ["100", "101_0", "101_1", "102_0", "102_1"]


def test_jobs_that_can_not_be_noted_are_cancelled(
    slurm: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(out: Path, new: object) -> None:
        raise OSError(errno.EDQUOT, "quota", str(out / "jobs.csv"))

    monkeypatch.setattr("medlaunch.remote.add_jobs", full)
    assert run_main(*words(slurm, phantoms, tmp_path / "s")) == 2
    assert fake_slurm.calls(slurm, "scancel") == [["100"]]


def test_a_job_file_that_names_no_jobs_is_damaged(
    slurm: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s"
    assert run_main(*words(slurm, phantoms, out)) == 0
    (out / "jobs.csv").write_text((out / "jobs.csv").read_text().replace("101", "abc"))
    assert run_main("sweep", "cancel", out) == 2
    assert "jobs.csv is damaged" in capsys.readouterr().err


def test_what_plan_json_names_runs_no_foreign_shell(
    slurm: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copied sweep may hold anything: of a cluster that was found `here` only numbers and names are taken, and
    another user's cluster file must be named anew.
    """
    out = tmp_path / "s"
    assert run_main(*words(slurm, phantoms, out)) == 0
    plan = json.loads((out / "plan.json").read_text())
    monkeypatch.setattr("medlaunch.remote.os.getuid", lambda: 4711)
    (slurm / "clusters.toml").chmod(0o644)
    os.chown(slurm / "clusters.toml", 4712, -1) if os.geteuid() == 0 else None
    assert run_main("sweep", "--resume", out) == 2
    assert "which plan.json names, is another user's" in capsys.readouterr().err
    plan["request"] |= {"cluster": "here", "cluster_file": ""}
    plan["cluster"] |= {"name": "here", "setup": ["touch /tmp/evil"], "gpus_per_node": 1}
    (out / "plan.json").write_text(json.dumps(plan))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert run_main("sweep", "--resume", out, "--dry-run") == 0
    assert "evil" not in capsys.readouterr().out
    plan["cluster"]["partition"] = "gpu\n#SBATCH --wrap=evil"
    (out / "plan.json").write_text(json.dumps(plan))
    assert run_main("sweep", "--resume", out, "--dry-run") == 2
    assert "holds a line break" in capsys.readouterr().err


def test_cancel(slurm: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s"
    assert run_main(*words(slurm, phantoms, out)) == 0
    place, other = out / "jobs", tmp_path / "other" / "jobs"
    (slurm / "squeue.txt").write_text(
        f"100|RUNNING|None|node1|{other}\n101|RUNNING|None|node1|{place}\n103|PENDING|Dependency||{place}\n"
    )
    assert run_main("sweep", "cancel", out) == 0
    printed = capsys.readouterr().out
    assert "2 jobs of" in printed
    assert "note: of the jobs that jobs.csv names, 1 work for another folder: left alone" in printed
    assert fake_slurm.calls(slurm, "scancel") == [["101", "103"]]
