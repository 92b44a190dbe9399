"""Sweeps on a real SLURM that breaks: dead nodes and daemons, members that fail, folders that nodes do not see."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from real_sweeps import TINY, Sweeps, at_step, same

pytestmark = [pytest.mark.real_slurm, pytest.mark.slow]


def test_a_dead_node_and_a_restarted_controller_lose_nothing(sweeps: Sweeps, tmp_path: Path) -> None:
    """The member goes on elsewhere from its last checkpoint, to the weights of an undisturbed run."""
    out = tmp_path / "sweep"
    sets = ("train.epochs=24", "train.save_every_s=1")
    sweeps.submit(out, "--models", "segresnet", sets=sets)
    run = sweeps.members(out)[0]
    sweeps.wait(run / "status.json", at_step(4))
    node = json.loads((run / "job.json").read_text())["nodes"][0]
    sweeps.cluster.stop_controller()
    sweeps.cluster.kill_node(node)
    sweeps.cluster.start_controller()
    sweeps.wait(run / "job.json", lambda told: told["starts"] == 2, seconds=120)
    assert json.loads((run / "job.json").read_text())["nodes"] != [node]
    sweeps.cluster.start_node(node)
    assert sweeps.finish(out)["missing"] == 0
    log = (out / "jobs" / f"{sweeps.jobs(out)[0]}_0_log.out").read_text()
    assert "going on from step" in log
    assert same(run, sweeps.alone(out, sets))


# torch as it is on a node whose driver is broken: built for CUDA, and no GPU that it can use
NO_DRIVER = """
import os
if os.environ.get("SLURMD_NODENAME") == "node1":
    import medtrain, torch
    torch.version.cuda = "13.0"
"""


def test_a_node_whose_gpus_are_broken_takes_no_second_task(sweeps: Sweeps, tmp_path: Path) -> None:
    """Its tasks start again on the other node, and those that wait, and the final job, are kept from it."""
    site, out = tmp_path / "site", tmp_path / "sweep"
    site.mkdir()
    (site / "sitecustomize.py").write_text(NO_DRIVER)
    python = sweeps.cluster.folder / "broken_python"  # see CLUSTERS
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH={site}:$PYTHONPATH\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    sweeps.submit(out, "--models", "segresnet", "--seeds", 6, on="broken")
    done = sweeps.script("sweep", "follow", out, "--every", "0.5")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "requeued: node1 was asked for 1 GPU, and torch" in done.stdout
    told = [json.loads((run / "job.json").read_text()) for run in sweeps.members(out)]
    assert all(about["nodes"] == ["node2"] for about in told)
    assert 1 <= sum(about["starts"] == 2 for about in told) <= 2  # as many as it has GPUs
    assert not list(out.rglob("failed.json"))


def test_members_that_fail_are_rows_and_the_others_an_ensemble(sweeps: Sweeps, tmp_path: Path) -> None:
    """One member with a foreign recipe in its folder, one cancelled, one killed; accounting is down; status 3."""
    out = tmp_path / "sweep"
    sweeps.submit(out, "--models", "segresnet", "--seeds", 5, sets=("train.epochs=12",))
    runs, jobs = sweeps.members(out), sweeps.jobs(out)
    runs[1].mkdir()
    recipe = json.loads((out / "plan.json").read_text())["members"][0]["settings"]
    (runs[1] / "recipe.json").write_text(json.dumps(recipe))
    # the last task of an array has the array's own number: it alone is requeued
    sweeps.wait(runs[0] / "status.json", at_step(2), seconds=200)
    for number in (2, 3, 4):
        sweeps.wait(runs[number] / "status.json", at_step(2), seconds=200)
        if number == 2:
            sweeps.cluster.command("scancel", jobs[2])
        elif number == 4:
            assert sweeps.raw(jobs[4]) == jobs[4].split("_")[0]
            sweeps.cluster.warn_job(jobs[4].split("_")[0])
        else:
            node = json.loads((runs[3] / "job.json").read_text())["nodes"][0]
            sweeps.cluster.kill_job(sweeps.raw(jobs[3]), node)
    sweeps.cluster.stop_accounting()
    try:
        told = sweeps.script("status", out)
        assert "sacct does not answer" in told.stdout
        done = sweeps.script("sweep", "follow", out, "--every", "1")
    finally:
        sweeps.cluster.start_accounting()
    assert done.returncode == 3, done.stdout[-2000:] + done.stderr[-2000:]
    starts = [json.loads((runs[n] / "job.json").read_text())["starts"] for n in (0, 4)]
    assert starts == [1, 2]
    table = sweeps.table(out)
    assert "another recipe" in table["brats_segresnet_demo (seed 1)"]["note"]
    assert "cancelled" in table["brats_segresnet_demo (seed 2)"]["note"]
    assert "failed: " in table["brats_segresnet_demo (seed 3)"]["note"]
    assert "SLURM" in table["brats_segresnet_demo (seed 3)"]["note"]
    names = [f"brats_segresnet_demo (seed {n})" for n in range(5)]
    lacks = ", ".join(names[1:4])
    note = table["Ensemble"]["note"]
    assert note == f"equal weights of brats_segresnet_demo, {names[4]}; without {lacks}"
    # only what is missing is submitted again
    (runs[1] / "recipe.json").unlink()
    done = sweeps.follow(out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(sweeps.jobs(out)) == 5 + 3
    assert len(sweeps.jobs(out, "prepare")) == 1
    assert "without" not in sweeps.table(out)["Ensemble"]["note"]


def test_a_final_job_that_never_reports_is_not_awaited_for_ever(
    sweeps: Sweeps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cancelled; following says so after a grace, and --resume submits another one for what is trained."""
    from medlaunch import follow
    from medtrain.errors import UserError

    monkeypatch.setenv("SLURM_CONF", str(sweeps.cluster.conf))
    monkeypatch.setattr(follow, "GRACE_S", 2.0)
    out = tmp_path / "sweep"
    sweeps.submit(out, "--models", "segresnet")
    final = sweeps.jobs(out, "finish")[0]
    sweeps.cluster.command("scancel", final)
    with pytest.raises(UserError, match=f"final job {final} cancelled"):
        follow.follow(out, 0.5)
    done = sweeps.follow(out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(sweeps.jobs(out)) == 1
    assert len(sweeps.jobs(out, "finish")) == 2


def test_data_that_can_not_be_prepared_is_told_and_nothing_waits(sweeps: Sweeps, tmp_path: Path) -> None:
    """The scans are damaged: the preparing job says which, the members are never started, status 2."""
    data = tmp_path / "damaged"
    shutil.copytree(sweeps.phantoms, data)
    for scan in (data / "imagesTr").iterdir():
        scan.write_bytes(b"no scan")
    out = tmp_path / "sweep"
    sets = [part for item in TINY for part in ("--set", item)]
    done = sweeps.script("sweep", "brats_demo", "--data", data, "--out", out, "--cluster", "main", "--cluster-file",
                         sweeps.cluster.folder / "clusters.toml", "--follow", "--every", "1", *sets)  # fmt: skip
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert "could not be prepared" in done.stderr
    assert ".nii.gz" in done.stderr
    assert done.stderr.count("\n") == 1


def test_too_much_memory_is_the_reason_in_the_table(sweeps: Sweeps, tmp_path: Path) -> None:
    """SLURM kills the member; the final job finds out why."""
    out = tmp_path / "sweep"
    sets = ("model.filters=64", "train.epochs=9")
    sweeps.submit(out, "--models", "segresnet", on="tight", sets=sets)
    done = sweeps.script("sweep", "follow", out, "--every", "1")
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert "no finished member (brats_segresnet_demo: killed, most likely out of memory" in done.stderr


def test_a_loss_that_is_no_number_is_the_reason_in_the_table(sweeps: Sweeps, tmp_path: Path) -> None:
    """Where every member fails there is no table to make: the final job says why, in one sentence."""
    out = tmp_path / "sweep"
    sets = ("optim.lr=1e15", "optim.weight_decay=1e15", "optim.clip_norm=0", "train.log_every=1", "train.epochs=9")
    sweeps.submit(out, "--models", "segresnet", sets=sets)
    done = sweeps.script("sweep", "follow", out, "--every", "1")
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"no finished member \(brats_segresnet_demo: .*gradients of 10 steps, \d+ to \d+, were not finite",
                     done.stderr)  # fmt: skip
    assert "| failed | FAILED" in sweeps.script("status", out).stdout


def test_folders_that_the_nodes_do_not_see(sweeps: Sweeps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that lies on the login node only, and an out folder that the nodes can not write."""
    from medlaunch import follow
    from medtrain.errors import UserError

    monkeypatch.setenv("SLURM_CONF", str(sweeps.cluster.conf))
    monkeypatch.setattr(follow, "GRACE_S", 2.0)
    data, out, blind = tmp_path / "data", tmp_path / "sweep", tmp_path / "blind"
    shutil.copytree(sweeps.phantoms, data)
    sweeps.cluster.hide(data)
    words = sweeps.words(out)
    words[words.index("--data") + 1] = data
    done = sweeps.script("sweep", *words, "--follow", "--every", "1")
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(rf"could not be prepared: {data}.*\(on node\d\)", done.stderr)
    blind.mkdir()
    sweeps.cluster.hide(blind)
    sweeps.submit(blind)
    with pytest.raises(UserError, match="can the nodes write there"):
        follow.follow(blind, 0.5)
    assert sweeps.script("status", blind).stdout.count("| lost") == 2


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("wrong_partition", "partition = 'mian'", "invalid partition name|not found"),
        ("wrong_account", "account = 'nobody'", "Invalid account"),
        ("too_long", "time = '01:00:00'", "20:00 at most"),
        ("too_large", "mem = '900G'", "memory|node configuration"),
    ],
)
def test_what_slurm_would_refuse_is_refused_before(
    sweeps: Sweeps, tmp_path: Path, name: str, line: str, words: str
) -> None:
    before = set(sweeps.cluster.output("squeue", "-h", "-o", "%i").split())  # jobs of tests before may be completing
    done = sweeps.script("sweep", *sweeps.words(tmp_path / "sweep", on=name))
    assert done.returncode == 2
    assert line in done.stderr
    assert re.search(words, done.stderr, re.IGNORECASE), done.stderr
    assert not (tmp_path / "sweep" / "jobs.csv").exists()
    assert set(sweeps.cluster.output("squeue", "-h", "-o", "%i").split()) <= before
