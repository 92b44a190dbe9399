"""Sweeps on a real SLURM: the batch script, arrays, several nodes, warnings, preemption, time limits, cancelling."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_helpers import ROOT
from real_sweeps import LONG, TINY, Sweeps, at_step, same

pytestmark = [pytest.mark.real_slurm, pytest.mark.slow]


def test_the_batch_script_submits_follows_and_shows_the_table(sweeps: Sweeps, tmp_path: Path) -> None:
    """`sbatch slurm/brats.sh` from another folder, into one with a blank, a quote and an umlaut; then again."""
    out, data = tmp_path / "it's ä sweep", tmp_path / 'my "data" ü'
    data.symlink_to(sweeps.phantoms)
    sets = [part for item in TINY for part in ("--set", item)]
    command = ["sbatch", "--wait", "--export=ALL", "--cpus-per-task=1", f"--output={tmp_path}/batch.log",
               str(ROOT / "slurm" / "brats.sh"), "--sweep", "brats_demo", "--every", "2", *sets]  # fmt: skip
    environment = {**os.environ, "SLURM_CONF": str(sweeps.cluster.conf), "DATA": str(data), "OUT": str(out),
                   "MEDTRAIN_ALLOW_CPU": "1"}  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=400, check=False
    )
    log = (tmp_path / "batch.log").read_text()
    assert done.returncode == 0, log[-3000:] + done.stderr
    assert (out / "table.md").read_text().strip() in log
    assert "exit status 0" in log
    assert set(sweeps.table(out)) == {"brats_segresnet_demo", "brats_unetr_demo", "Ensemble"}
    snapshot = next((out / "code").iterdir())
    assert (snapshot / "medlaunch" / "jobs.py").is_file()
    about = json.loads((snapshot / "snapshot.json").read_text())
    assert about["commit"]
    screen = sweeps.script("status", out)
    assert screen.stdout.count("| done") == 2, screen.stdout + screen.stderr
    again = sweeps.follow(out)
    assert again.returncode == 0
    assert "nothing is missing" in again.stdout
    assert len(sweeps.jobs(out)) == 2


def test_a_batch_job_of_images_is_requeued_itself_and_follows_further(
    sweeps: Sweeps, pictures: Path, tmp_path: Path
) -> None:
    """`sbatch --export=DATA=…,OUT=… slurm/multicancer.sh`, warned of its own time limit once it has submitted."""
    out, log = tmp_path / "sweep", tmp_path / "batch.log"
    sets = ("data.size=32", "train.epochs=1", "train.batch=16", "train.workers=0", "train.validate_every=1")
    words = ["sbatch", "--parsable", f"--export=DATA={pictures},OUT={out},MEDTRAIN_ALLOW_CPU=1",
             "--cpus-per-task=1", f"--output={log}", str(ROOT / "slurm" / "multicancer.sh"), "--sweep",
             "multicancer_demo", "--models", "mobilenetv3_small_100", "--cancers", "Oral Cancer", "--every",
             "1"]  # fmt: skip
    words += [part for item in sets for part in ("--set", item)]
    environment = {**os.environ, "SLURM_CONF": str(sweeps.cluster.conf)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    job = done.stdout.strip()
    sweeps.cluster.wait(lambda: (out / "jobs.csv").exists() and len(sweeps.jobs(out, "finish")) == 1, 120)
    sweeps.cluster.command("scancel", "--batch", "--signal=USR1", job)
    sweeps.cluster.wait(lambda: "exit status" in log.read_text(), 200)
    sweeps.cluster.wait(
        lambda: sweeps.cluster.output("squeue", "-h", "-t", "all", "-j", job, "-o", "%T") == "COMPLETED\n"
    )
    text = log.read_text()
    assert "exit status 0" in text
    assert text.count("submitted finish") == 1
    assert (out / "table.md").read_text().strip() in text
    assert len(sweeps.jobs(out)) == 1


def test_an_array_is_throttled_and_edits_after_submission_change_nothing(sweeps: Sweeps, tmp_path: Path) -> None:
    """Three seeds, one at a time; the code that submitted them is broken while they wait."""
    checkout = tmp_path / "checkout"
    for folder, name in (
        ("medtrain",) * 2,
        ("medseg",) * 2,
        ("medcls",) * 2,
        ("launch", "medlaunch"),
        ("slurm", "medslurm"),
        ("kernels", "medkernels"),
    ):
        shutil.copytree(ROOT / folder, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path / "sweep"
    words = sweeps.words(out, "--models", "segresnet", "--seeds", 3, "--throttle", 1)
    environment = {**os.environ, "SLURM_CONF": str(sweeps.cluster.conf), "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, str(checkout / "medlaunch" / "sweep.py"), *map(str, words)],
                          capture_output=True, text=True, env=environment, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for file in checkout.rglob("*.py"):
        file.write_text("raise SystemExit('edited')\n")
    assert len({job.split("_")[0] for job in sweeps.jobs(out)}) == 1
    assert sweeps.finish(out) == {"job": sweeps.jobs(out, "finish")[0], "status": "done", "missing": 0}
    assert json.loads(next((out / "code").glob("*/snapshot.json")).read_text())["from"] == str(checkout)
    number = sweeps.jobs(out)[0].split("_")[0]
    asked = ("sacct", "-nXP", "-j", number, "-o")
    sweeps.cluster.wait(lambda: sweeps.cluster.output(*asked, "State").count("COMPLETED") == 3)
    told = sweeps.cluster.output(*asked, "Start,End").split()
    spans = sorted(tuple(line.split("|")) for line in told)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    table = sweeps.table(out)
    assert list(table) == ["brats_segresnet_demo", "brats_segresnet_demo (seed 1)", "brats_segresnet_demo (seed 2)",
                           "brats_segresnet_demo, mean of 3", "Ensemble"]  # fmt: skip


def test_two_members_on_two_nodes_each_and_a_warning(sweeps: Sweeps, tmp_path: Path) -> None:
    """Two sweeps of 2 nodes x 2 processes share the nodes; one is warned and ends with the same weights."""
    extra = ("--models", "segresnet", "--nodes", 2, "--processes", 2)
    sets = ("train.batch=4", "train.epochs=8", "train.save_every_s=1000")
    calm, warned = tmp_path / "calm", tmp_path / "warned"
    for out in (calm, warned):
        sweeps.submit(out, *extra, sets=sets)
    run = sweeps.members(warned)[0]
    sweeps.wait(run / "status.json", at_step(3))
    sweeps.cluster.command("scancel", "--signal=USR2", sweeps.jobs(warned)[0])
    assert sweeps.finish(warned)["missing"] == 0
    assert sweeps.finish(calm)["missing"] == 0
    assert json.loads((run / "job.json").read_text())["starts"] == 2
    assert json.loads((sweeps.members(calm)[0] / "job.json").read_text())["starts"] == 1
    assert same(run, sweeps.members(calm)[0])
    logs = sorted((calm / "jobs").glob(f"{sweeps.jobs(calm)[0]}_*_log.out"))
    said = [line for log in logs for line in log.read_text().splitlines() if line.startswith("rank ")]
    places = {(line.split(" on ")[1].split(":")[0], line.split("GPU ")[1].split()[0]) for line in said}
    assert len(said) == 4
    assert len(places) == 4  # four ranks, each with a GPU of its own
    assert {node for node, _ in places} == {"node1", "node2"}


def test_a_preempted_array_task_goes_on_and_a_warned_final_job_too(sweeps: Sweeps, tmp_path: Path) -> None:
    """A job of a higher partition takes the nodes away; the same sweep without it ends with the same weights."""
    out = tmp_path / "preempted"
    extra = ("--models", "segresnet", "--seeds", 2)
    sweeps.submit(out, *extra, on="cheap", sets=LONG)
    runs = sweeps.members(out)
    for run in runs:
        sweeps.wait(run / "status.json", at_step(4))
    done = sweeps.cluster.command("sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", "--output=/dev/null",
                                  "--wrap", "sleep 2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for run in runs:
        sweeps.wait(run / "job.json", lambda told: told["starts"] == 2)
    final = sweeps.jobs(out, "finish")[0]
    sweeps.cluster.wait(lambda: "RUNNING" in sweeps.cluster.output("squeue", "-h", "-j", final, "-o", "%T"), 200)
    log = out / "jobs" / f"{final}_0_log.out"
    sweeps.cluster.wait(lambda: log.exists() and "Loading pickle" in log.read_text(), 60)
    time.sleep(1.5)
    sweeps.cluster.command("scancel", "--signal=USR2", final)
    assert sweeps.finish(out)["missing"] == 0
    assert f"requeued job {final}" in log.read_text().lower()  # or by submitit, where Python had not begun to listen
    assert same(runs[0], sweeps.alone(out, LONG))


def test_a_time_limit_is_no_end(sweeps: Sweeps, tmp_path: Path) -> None:
    """A member that needs more than its wall time is requeued by itself until it is done."""
    out = tmp_path / "sweep"
    sets = ("train.epochs=120", "train.validate_every=60")
    sweeps.submit(out, "--models", "segresnet", "--time", "1", sets=sets)
    run = sweeps.members(out)[0]
    assert sweeps.finish(out, seconds=1200)["missing"] == 0
    assert json.loads((run / "job.json").read_text())["starts"] >= 2
    assert same(run, sweeps.alone(out, sets))


def test_a_second_submission_is_refused_and_cancel_ends_the_first(sweeps: Sweeps, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    sweeps.submit(out, sets=LONG)
    again = sweeps.script("sweep", *sweeps.words(out, sets=LONG))
    assert again.returncode == 2
    assert "jobs that wait or run" in again.stderr
    here = sweeps.script("sweep", "brats_demo", "--data", sweeps.phantoms, "--out", out)
    assert here.returncode == 2
    assert "has jobs on the cluster" in here.stderr
    done = sweeps.script("sweep", "cancel", out)
    assert done.returncode == 0
    assert "4 jobs" in done.stdout
    sweeps.cluster.wait(lambda: not sweeps.cluster.output("squeue", "-h", "-o", "%i").split(), 60)
