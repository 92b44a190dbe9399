"""Stand-ins of SLURM's programs and a cluster file, for the programs."""

import os
from pathlib import Path

import fake_slurm
import pytest

CLUSTERS = """
[lab]
partition = "gpu"
gpus_per_node = 4
cpus_per_gpu = 2
time = "02:00:00"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the stand-ins answer from, with clusters.toml; an empty queue, no accounting."""
    folder = tmp_path / "slurm"
    monkeypatch.setenv("PATH", f"{fake_slurm.install(folder)}:{os.environ['PATH']}")
    for name in [key for key in os.environ if key.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    (folder / "clusters.toml").write_text(CLUSTERS)
    (folder / "squeue.txt").write_text("")
    return folder
