"""Cluster files: every key, every mistake with its line; times; what a node is told."""

import shlex
import subprocess
from pathlib import Path

import pytest

from medslurm import cluster, commands
from medslurm.cluster import Cluster, minutes, read_cluster
from medslurm.commands import ClusterError

GOOD = """
# a comment
[lab]
partition = "gpu"
account = "onc"
gpus_per_node = 4
mem = 64000
time = "1-12:00:00"
modules = ["cuda/13", "it's odd"]
venv = "/home/me/my venv"
setup = ["export A=1"]
sbatch = { "mail-type" = "END" }

[cpu]
gpus_per_node = 0
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "clusters.toml"
    path.write_text(text)
    return path


def test_a_cluster_is_read_with_its_lines(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    lab = read_cluster("lab", path)
    assert (lab.partition, lab.account, lab.gpus_per_node, lab.mem) == ("gpu", "onc", 4, "64000")
    assert lab.sbatch == {"mail-type": "END"}
    assert lab.where("account") == f"{path}, line 5 (account = 'onc')"
    assert lab.where("qos") == f"cluster lab of {path}"
    assert read_cluster("cpu", path).gpus_per_node == 0


def test_what_the_node_runs_is_quoted(tmp_path: Path) -> None:
    lab = read_cluster("lab", written(tmp_path, GOOD))
    said = ["echo() { :; }", *lab.setup_lines()]
    assert said[-1] == "export A=1"
    script = "module() { printf '%s|' \"$@\"; }\n" + "\n".join(lab.setup_lines()[:3])
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "load|cuda/13|load|it's odd|"
    assert shlex.split(lab.python_command()) == ["/home/me/my venv/bin/python"]
    assert lab.setup_lines()[3].startswith(". '/home/me/my venv/bin/activate' || {")
    boxed = Cluster(name="x", container=("apptainer", "exec", "--nv", "my image.sif"), venv="/v")
    assert shlex.split(boxed.python_command()) == ["apptainer", "exec", "--nv", "my image.sif", "python"]
    assert boxed.setup_lines() == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[lab]\npartitoin = 'x'", "line 2: there is no key 'partitoin': choose partition"),
        ("[lab]\n\ngpus_per_node = 'four'", "line 3: gpus_per_node must be a whole number"),
        ("[lab]\ngpus_per_node = true", "must be a whole number"),
        ("[lab]\nmodules = [1]", "modules must be a list of texts"),
        ("[lab]\nsbatch = 3", "sbatch must be a table"),
        ("[lab]\ngpus_as = 'many'", "must be one of gres, gpus-per-node"),
        ("[lab]\ntime = 'a day'", "line 2 (time = 'a day') is no time"),
        ("[lab]\nmem = 'lots'", "is no memory"),
        ("[lab]\nmem_per_gpu = '8 GB'", "line 2 (mem_per_gpu = '8 GB') is no memory"),
        ("[lab]\ncontainer = ['box']\nvenv = '/v'", "line 3 (venv = '/v'): the container has a Python of its own"),
        ("[lab]\nsignal_s = 0", "must be at least 1"),
        ("[lab", "is not TOML"),
        ("lab = 3", "lab is no table"),
        ("[other]\n", "has no cluster 'lab': it describes other"),
    ],
)
def test_mistakes_name_file_line_and_remedy(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ClusterError) as caught:
        read_cluster("lab", written(tmp_path, text))
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_a_site_and_an_environment_name_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDTRAIN_CLUSTERS", raising=False)
    for name in ("DEFAULT_FILE", "SITE_FILE"):
        monkeypatch.setattr(cluster, name, str(tmp_path / name))
    (tmp_path / "SITE_FILE").write_text("[lab]\naccount = 'the site'\n")
    assert read_cluster("lab").account == "the site"
    (tmp_path / "DEFAULT_FILE").write_text("[lab]\naccount = 'mine'\n")
    assert read_cluster("lab").account == "mine"
    monkeypatch.setenv("MEDTRAIN_CLUSTERS", str(tmp_path / "SITE_FILE"))
    assert read_cluster("lab").account == "the site"
    monkeypatch.setenv("MEDTRAIN_CLUSTERS", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match="none is not there"):
        read_cluster("lab")


def test_jobs_without_gpus_are_described_apart(tmp_path: Path) -> None:
    lab = read_cluster("lab", written(tmp_path, "[lab]\nqos = 'gpuq'\nconstraint = 'a100'\nmem_per_gpu = '48G'\n"))
    assert (lab.memory(3), lab.memory(0)) == ("144G", "")
    cpu = lab.without_gpus()
    assert (cpu.qos, cpu.constraint, cpu.memory(0), cpu.time) == ("gpuq", "a100", "", "24:00:00")
    text = "[lab]\nqos = 'gpuq'\nconstraint = 'a100'\nmem = '64G'\ncpu_partition = 'cpu'\ncpu_time = '30'\n"
    cpu = read_cluster("lab", written(tmp_path, text)).without_gpus()
    assert (cpu.partition, cpu.qos, cpu.constraint, cpu.mem, cpu.time) == ("cpu", "", "", "64G", "30")
    text += "cpu_qos = 'short'\ncpu_constraint = 'big'\ncpu_mem = '16G'\n"
    cpu = read_cluster("lab", written(tmp_path, text)).without_gpus()
    assert (cpu.qos, cpu.constraint, cpu.mem) == ("short", "big", "16G")


def test_an_absent_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"slurm/README\.md"):
        read_cluster("lab", tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("time", "wanted"),
    [("90", 90), ("90:01", 91), ("12:00:00", 720), ("1-0", 1440), ("2-12", 3600), ("1-2:30", 1590), ("1-0:0:1", 1441),
     ("UNLIMITED", 525600), ("", None), ("x", None), ("1:2:3:4", None), ("0", None)],
)  # fmt: skip
def test_times(time: str, wanted: int | None) -> None:
    assert minutes(time) == wanted


@pytest.mark.slurm
def test_a_batch_job_finds_its_own_cluster(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "DEFAULT_FILE", str(tmp_path / "none.toml"))
    with pytest.raises(ClusterError, match="the batch job that it is typed in"):
        read_cluster("here")
    (slurm / "sinfo.txt").write_text("64|gpu:a100:4(S:0-1)\n128|gpu:8\n")
    for name, value in (("ID", "7"), ("PARTITION", "gpu"), ("ACCOUNT", "onc"), ("QOS", "normal")):
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    made = read_cluster("here")
    assert (made.partition, made.account, made.qos) == ("gpu", "onc", "")
    assert (made.gpus_per_node, made.cpus_per_gpu, made.time) == (4, 8, "24:00:00")


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [("8|(null)\n64|gpu:a100:4\n128|gpu:8\n", (64, 4)), ("8|(null)\n4|(null)\n", (4, 0)), ("", (1, 0))],
)
def test_a_node_without_gpus_among_others_is_not_the_measure(slurm: Path, nodes: str, wanted: tuple[int, int]) -> None:
    (slurm / "sinfo.txt").write_text(nodes)
    assert commands.node_kinds("mixed") == wanted
