"""A real SLURM for the tests that want one, started once; they skip where it can not be."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_sweeps import CLUSTERS, Sweeps
from slurm_cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes of four CPUs and two GPUs that do nothing; `clusters.toml` lies in its folder."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="medslurm-"))
    folder.chmod(0o755)  # munge wants its socket to be reached by everybody
    (folder / "clusters.toml").write_text(CLUSTERS.replace("FOLDER", str(folder)))
    with Cluster(folder) as made:
        yield made
    assert not made.left(), "the cluster leaves processes behind"
    shutil.rmtree(folder)


@pytest.fixture
def sweeps(cluster: Cluster, phantoms: Path) -> Sweeps:
    return Sweeps(cluster, phantoms)
