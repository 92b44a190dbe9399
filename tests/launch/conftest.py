"""A cluster file beside the stand-ins of SLURM's programs."""

from pathlib import Path

import pytest

CLUSTERS = """
[lab]
partition = "gpu"
gpus_per_node = 4
cpus_per_gpu = 2
time = "02:00:00"
"""


@pytest.fixture
def slurm(slurm: Path) -> Path:
    """With clusters.toml and an empty queue; there is no accounting."""
    (slurm / "clusters.toml").write_text(CLUSTERS)
    (slurm / "squeue.txt").write_text("")
    return slurm
