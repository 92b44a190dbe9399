"""What the tests on a real SLURM share: the cluster, its description, and sweeps of tiny networks on it."""

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from launch_helpers import run_script
from slurm_cluster import Cluster

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
setup = ["export KMP_DUPLICATE_LIB_OK=1", "export MEDTRAIN_ALLOW_CPU=1"]

[cheap]
partition = "scavenge"
gpus_per_node = 2
cpus_per_gpu = 1
mem = "2000M"
time = "00:20:00"
cpu_time = "10"
signal_s = 30
setup = ["export MEDTRAIN_ALLOW_CPU=1"]

[broken]
partition = "main"
gpus_per_node = 2
cpus_per_gpu = 1
mem = "2000M"
time = "00:20:00"
cpu_time = "10"
setup = ["[ $SLURMD_NODENAME = node1 ] || export MEDTRAIN_ALLOW_CPU=1"]
python = "FOLDER/broken_python"

[tight]
partition = "main"
gpus_per_node = 0
cpus_per_gpu = 1
mem = "1500M"
time = "10"

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

    def finish(self, out: Path, seconds: float = 600) -> dict[str, object]:
        self.wait(out / "finish.json", seconds=seconds)
        return json.loads((out / "finish.json").read_text())

    def wait(self, path: Path, holds: Callable[[dict[str, object]], bool] = bool, seconds: float = 400) -> None:
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

    def alone(self, out: Path, sets: tuple[str, ...]) -> Path:
        """The same member trained without SLURM, undisturbed."""
        calm = out.with_name("calm")
        chosen = [part for item in (*TINY, *sets) for part in ("--set", item)]
        done = run_script("train", "brats_segresnet_demo", "--cache", out / "cache.h5", "--out", calm, *chosen)
        assert done.returncode == 0, done.stderr[-2000:]
        return calm

    def raw(self, job: str) -> str:
        return self.cluster.output("squeue", "-h", "-j", job, "-o", "%A").strip()

    def table(self, out: Path) -> dict[str, dict[str, str]]:
        with open(out / "table.csv", encoding="utf-8") as file:
            return {line["member"]: line for line in csv.DictReader(file)}


def at_step(step: int) -> Callable[[dict[str, object]], bool]:
    return lambda status: status["phase"] == "train" and int(str(status["step"])) >= step


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoint_last.pt", weights_only=True)["model"]


def same(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return all(torch.equal(a[name], b[name]) for name in a)
