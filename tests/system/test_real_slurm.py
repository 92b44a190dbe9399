"""Sweeps on a real SLURM: arrays, preemption, dead nodes, dead daemons, members that fail, the batch script."""

import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from launch_helpers import ROOT, run_script
from slurm_cluster import Cluster, why_not

pytestmark = [pytest.mark.real_slurm, pytest.mark.slow]

CLUSTERS = """
[main]
partition = "main"
account = "root"
gpus_per_node = 2
cpus_per_gpu = 1
mem = "2000M"
time = "00:20:00"
cpu_time = "10"
signal_s = 30
setup = ["export KMP_DUPLICATE_LIB_OK=1"]

[cheap]
partition = "scavenge"
gpus_per_node = 2
cpus_per_gpu = 1
mem = "2000M"
time = "00:20:00"
cpu_time = "10"
signal_s = 30

[wrong_partition]
partition = "mian"

[wrong_account]
partition = "main"
account = "nobody"

[too_long]
partition = "short"
time = "01:00:00"

[too_large]
partition = "main"
mem = "900G"
cpus_per_gpu = 1
"""
TINY = (
    "data.crop=32,32,32", "data.spacing_mm=0", "data.val_fraction=0.4", "train.batch=2", "train.epochs=2",
    "train.precision=fp32", "train.workers=0", "train.validate_every=1", "train.deterministic=true", "optim.ema=0",
)  # fmt: skip
LONG = ("train.epochs=16", "train.save_every_s=2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of four CPUs and two GPUs that do nothing; `clusters.toml` lies in its folder."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="medslurm-"))
    folder.chmod(0o755)  # munge wants its socket to be reached by everybody
    (folder / "clusters.toml").write_text(CLUSTERS)
    with Cluster(folder) as made:
        yield made
    assert not made.left(), "the cluster leaves processes behind"
    shutil.rmtree(folder)


class Sweeps:
    """Submits sweeps of tiny networks, waits for what they write, reads what they leave."""

    def __init__(self, cluster: Cluster, phantoms: Path):
        self.cluster, self.phantoms = cluster, phantoms

    def script(self, program: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return run_script(program, *arguments, environment={"SLURM_CONF": str(self.cluster.conf), **environment})

    def submit(self, out: Path, *extra: object, on: str = "main", sets: tuple[str, ...] = ()) -> None:
        done = self.script("sweep", *self.words(out, *extra, on=on, sets=sets))
        assert done.returncode == 0, done.stderr[-2000:]

    def words(self, out: Path, *extra: object, on: str = "main", sets: tuple[str, ...] = ()) -> list[object]:
        chosen = [part for item in (*TINY, *sets) for part in ("--set", item)]
        return ["brats_demo", "--data", self.phantoms, "--out", out, "--cluster", on, "--cluster-file",
                self.cluster.folder / "clusters.toml", *chosen, *extra]  # fmt: skip

    def follow(self, out: Path) -> subprocess.CompletedProcess[str]:
        return self.script("sweep", "--resume", out, "--follow", "--every", "1")

    def finish(self, out: Path, seconds: float = 240) -> dict[str, object]:
        self.wait(out / "finish.json", seconds=seconds)
        return json.loads((out / "finish.json").read_text())

    def wait(self, path: Path, holds: Callable[[dict[str, object]], bool] = bool, seconds: float = 120) -> None:
        def ready() -> bool:
            try:
                return holds(json.loads(path.read_text()))
            except (OSError, ValueError):
                return False

        self.cluster.wait(ready, seconds)

    def members(self, out: Path) -> list[Path]:
        return [out / m["folder"] for m in json.loads((out / "plan.json").read_text())["members"]]

    def jobs(self, out: Path, kind: str = "train") -> list[str]:
        with open(out / "jobs.csv", encoding="utf-8") as file:
            return [line["job"] for line in csv.DictReader(file) if line["kind"] == kind]

    def table(self, out: Path) -> dict[str, dict[str, str]]:
        with open(out / "table.csv", encoding="utf-8") as file:
            return {line["member"]: line for line in csv.DictReader(file)}


@pytest.fixture
def sweeps(cluster: Cluster, phantoms: Path) -> Sweeps:
    return Sweeps(cluster, phantoms)


def at_step(step: int) -> Callable[[dict[str, object]], bool]:
    return lambda status: status["phase"] == "train" and int(str(status["step"])) >= step


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoint_last.pt", weights_only=True)["model"]


def same(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_batch_script_submits_follows_and_shows_the_table(sweeps: Sweeps, tmp_path: Path) -> None:
    """`sbatch slurm/brats.sh` from another folder, into one with a blank, a quote and an umlaut; then again."""
    out = tmp_path / "it's ä sweep"
    sets = [part for item in TINY for part in ("--set", item)]
    command = ["sbatch", "--wait", "--export=ALL", "--cpus-per-task=1", f"--output={tmp_path}/batch.log",
               str(ROOT / "slurm" / "brats.sh"), "--sweep", "brats_demo", "--every", "2", *sets]  # fmt: skip
    environment = {**os.environ, "SLURM_CONF": str(sweeps.cluster.conf), "DATA": str(sweeps.phantoms), "OUT": str(out)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=400, check=False)
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


def test_an_array_is_throttled_and_edits_after_submission_change_nothing(sweeps: Sweeps, tmp_path: Path) -> None:
    """Three seeds, one at a time; the code that submitted them is broken while they wait."""
    checkout = tmp_path / "checkout"
    for folder, name in (
        ("medtrain",) * 2,
        ("medseg",) * 2,
        ("medcls",) * 2,
        ("launch", "medlaunch"),
        ("slurm", "medslurm"),
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
    out, calm = tmp_path / "preempted", tmp_path / "calm"
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
    assert f"requeued job {final}" in log.read_text()
    words = ["brats_segresnet_demo", "--cache", out / "cache.h5", "--out", calm]
    sets = [part for item in (*TINY, *LONG) for part in ("--set", item)]
    alone = run_script("train", *words, *sets)
    assert alone.returncode == 0, alone.stderr[-2000:]
    assert same(runs[0], calm)


def test_a_time_limit_is_no_end(sweeps: Sweeps, tmp_path: Path) -> None:
    """A member that needs more than its wall time is requeued by itself until it is done."""
    out = tmp_path / "sweep"
    sweeps.submit(out, "--models", "segresnet", "--time", "1", sets=("train.epochs=400", "train.validate_every=100"))
    run = sweeps.members(out)[0]
    sweeps.wait(run / "job.json", lambda told: int(str(told["starts"])) >= 2, seconds=150)
    sweeps.wait(run / "status.json", lambda status: int(str(status["step"])) > 0)
    assert sweeps.script("sweep", "cancel", out).returncode == 0
    sweeps.cluster.wait(lambda: "RUNNING" not in sweeps.cluster.output("squeue", "-h", "-o", "%T"), 60)


def test_a_dead_node_and_a_restarted_controller_lose_nothing(sweeps: Sweeps, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    sweeps.submit(out, "--models", "segresnet", sets=("train.epochs=24", "train.save_every_s=1"))
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


def test_members_that_fail_are_rows_and_the_others_an_ensemble(sweeps: Sweeps, tmp_path: Path) -> None:
    """One member with a foreign recipe in its folder, one cancelled, one killed; accounting is down; status 3."""
    out = tmp_path / "sweep"
    sweeps.submit(out, "--models", "segresnet", "--seeds", 5, sets=("train.epochs=8",))
    runs, jobs = sweeps.members(out), sweeps.jobs(out)
    runs[1].mkdir()
    recipe = json.loads((out / "plan.json").read_text())["members"][0]["settings"]
    (runs[1] / "recipe.json").write_text(json.dumps(recipe))
    for number in (2, 3):
        sweeps.wait(runs[number] / "status.json", at_step(2), seconds=200)
        if number == 2:
            sweeps.cluster.command("scancel", jobs[2])
        else:
            node = json.loads((runs[3] / "job.json").read_text())["nodes"][0]
            raw = sweeps.cluster.output("squeue", "-h", "-j", jobs[3], "-o", "%A").strip()
            sweeps.cluster.kill_job(raw, node)
    sweeps.cluster.stop_accounting()
    try:
        told = sweeps.script("status", out)
        assert "sacct does not answer" in told.stdout
        done = sweeps.script("sweep", "follow", out, "--every", "1")
    finally:
        sweeps.cluster.start_accounting()
    assert done.returncode == 3, done.stdout[-2000:] + done.stderr[-2000:]
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
    done = sweeps.script("sweep", *sweeps.words(tmp_path / "sweep", on=name))
    assert done.returncode == 2
    assert line in done.stderr
    assert re.search(words, done.stderr, re.IGNORECASE), done.stderr
    assert not (tmp_path / "sweep" / "jobs.csv").exists()
    assert not sweeps.cluster.output("squeue", "-h").strip()
