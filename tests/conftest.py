"""Data that tests share: small phantoms and their caches, and the real cases where they lie beside the checkout."""

import medtrain  # noqa: F401  # isort: skip  (before torch: it says how threads wait)

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_slurm
import pytest
import torch

from medcls.recipes import RECIPES as CLS_RECIPES
from medcls.recipes import ClsRecipe
from medseg.preparation import Preparation, prepare_dataset
from medseg.recipes import RECIPES, SegRecipe

# Without a GPU triton's interpreter runs the kernels on the CPU; triton reads this when it decorates a kernel. Only
# tests that ask for `impl="fused"` meet it: `auto` takes the reference on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Two threads a process at most: several processes run at once in the distributed tests.
os.environ.setdefault("OMP_NUM_THREADS", "2")

ROOT = Path(__file__).resolve().parents[1]
REAL_BRATS = ROOT.parent / "shared" / "data" / "brats_mini"
REAL_IMAGES = ROOT.parent / "shared" / "data" / "multicancer_mini"

# Of the files that workers share (`tests/run.sh`), those that take longest begin first.
LONGEST = ("launch/test_sweep.py", "medcls/test_training.py", "system/test_fuzz.py", "medtrain/test_engine.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        ranks = {ROOT / "tests" / name: rank for rank, name in enumerate(LONGEST)}
        items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where a run must end in time (`.ci/run`), what has not begun by then is skipped and says so."""
    until = float(os.environ.get("MEDTRAIN_TEST_UNTIL", "inf"))
    if time.time() > until:
        pytest.skip("the time for tests is over on this slow machine (MEDTRAIN_TEST_UNTIL)")


@pytest.fixture(autouse=True)
def no_rank_stays() -> Iterator[None]:
    """DeepSpeed in this process leaves LOCAL_RANK, which would go to the jobs of later tests."""
    yield
    os.environ.pop("LOCAL_RANK", None)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small phantoms in MSD form."""
    from medseg.phantom import write_dataset

    return write_dataset(tmp_path_factory.mktemp("phantoms"), cases=5, seed=3, shape=(48, 56, 40), spacing_mm=4.0)


@pytest.fixture(scope="session")
def cache(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms' cache at their own spacing."""
    return prepare_dataset(phantoms, tmp_path_factory.mktemp("cache") / "c.h5", Preparation())


@pytest.fixture(scope="session")
def real_brats() -> Path:
    """The eight real cases; tests that use them skip elsewhere."""
    if not (REAL_BRATS / "dataset.json").is_file():
        pytest.skip("the real cases (brats_mini) do not lie beside this checkout")
    return REAL_BRATS


@pytest.fixture(scope="session")
def real_images() -> Path:
    """The 360 real brain MRIs; tests that use them skip elsewhere."""
    if not REAL_IMAGES.is_dir():
        pytest.skip("the real images (multicancer_mini) do not lie beside this checkout")
    return REAL_IMAGES


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantom images: 20 of each of 5 classes of two cancers, every tenth kind of copy among them."""
    from medcls.phantom import write_dataset

    return write_dataset(tmp_path_factory.mktemp("pictures"), images=20, size=96, seed=5)


@pytest.fixture(scope="session")
def image_cache(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom images' cache."""
    from medcls.preparation import prepare_folder

    return prepare_folder(pictures, tmp_path_factory.mktemp("images") / "c.h5")


TINY_IMAGES = (
    "data.size=32", "data.cancer=Oral Cancer", "train.batch=4", "train.epochs=1", "train.precision=fp32",
    "train.workers=0", "train.validate_every=1", "optim.ema=0", "train.deterministic=true",
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_images() -> Callable[..., ClsRecipe]:
    """A MobileNetV3-Small recipe of a few seconds, with overrides."""
    return lambda *extra: CLS_RECIPES["multicancer_mobilenetv3_demo"]().override([*TINY_IMAGES, *extra])


TINY = (
    "data.crop=32,32,32", "data.spacing_mm=0", "train.batch=2", "train.epochs=1",
    "train.precision=fp32", "train.workers=0", "model.dropout=0",
    "train.validate_every=1", "optim.ema=0", "train.deterministic=true",
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny() -> Callable[..., SegRecipe]:
    """A SegResNet recipe of a few seconds, with overrides."""
    return lambda *extra: RECIPES["brats_segresnet_demo"]().override([*TINY, *extra])


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins of SLURM's programs on PATH: the folder that they answer from, once a test writes their files."""
    folder = tmp_path / "slurm"
    monkeypatch.setenv("PATH", f"{fake_slurm.install(folder)}:{os.environ['PATH']}")
    for name in [key for key in os.environ if key.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return folder
