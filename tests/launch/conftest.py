"""A cluster file beside the stand-ins of SLURM's programs; finished sweeps of one member."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, TINY_IMAGES
from launch_helpers import run_main

from medlaunch.plan import Request, make_plan, write_plan
from medlaunch.report import Submitted, add_jobs
from medlaunch.tasks import DOORS

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


def made(task: str, cache: Path, sweep: Path, settings: tuple[str, ...]) -> Path:
    """A finished sweep of one member that was hardly trained."""
    door = DOORS[task]
    name = "brats_segresnet_demo" if task == "brats" else "multicancer_mobilenetv3_demo"
    recipe = door.RECIPES[name]().override(list(settings))
    request = Request(sweep="brats_demo" if task == "brats" else "multicancer_demo", data="/data")
    plan = make_plan(request, [recipe])
    sweep.mkdir()
    shutil.copy(cache, sweep / plan["cache"])
    run = sweep / door.folder(recipe)
    sets = [part for item in settings for part in ("--set", item)]
    assert run_main("train", name, "--cache", sweep / plan["cache"], "--out", run, *sets) == 0
    write_plan(sweep, plan)
    add_jobs(sweep, [Submitted("train", "7_0", run.name, str(sweep / "jobs" / "7_0.out"), "code")])
    shutil.rmtree(run / "tensorboard")
    run.rename(sweep / "member")
    for file in ("plan.json", "jobs.csv"):
        (sweep / file).write_text((sweep / file).read_text().replace(run.name, "member"))
    return sweep


@pytest.fixture(scope="session")
def sweeps(cache: Path, image_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished sweep of each task."""
    folder = tmp_path_factory.mktemp("sweeps")
    return {
        "brats": made("brats", cache, folder / "brats", TINY),
        "multicancer": made("multicancer", image_cache, folder / "multicancer", TINY_IMAGES),
    }


@pytest.fixture
def copy(sweeps: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A sweep that a test may spoil."""
    return lambda task: Path(shutil.copytree(sweeps[task], tmp_path / "sweep"))
