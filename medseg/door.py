"""What the launcher asks of brain-tumour segmentation; everything heavy is imported inside."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.recipes import RECIPES as RECIPES
from medseg.recipes import SWEEPS as SWEEPS
from medseg.recipes import SegRecipe
from medseg.settings import check_network, check_used
from medtrain.errors import UserError

if TYPE_CHECKING:
    from medseg.cache import Cache
    from medseg.task import SegTask
    from medtrain.estimate import Example

TASK = "brats"
Recipe = SegRecipe
SCORE_NOTE = "Dice on the original spacing, HD95 in mm"
MEMORY_FIELDS = "train.batch or data.crop"  # what to lower where it does not suffice
UNUSED_OPTIONS = {"cancers": ()}  # of a sweep, with their defaults
CPU_RECIPES = "brats_segresnet_2mm and the demo recipes"  # what is made for CPUs
FINISH_ON_GPU = True  # the ensemble predicts volumes
OUTPUTS = {"table.csv": "table", "cases.csv": "every case", "figures": "pictures"}


def open_cache(path: Path) -> "Cache":
    """A cache of volumes."""
    from medseg.cache import Cache

    return Cache(path)


def make_task(recipe: SegRecipe, cache: "Cache") -> "SegTask":
    """The task that the engine trains."""
    from medseg.task import SegTask

    return SegTask(recipe, cache)


def example(recipe: SegRecipe, batch: int, device: Any) -> "Example":
    """A step without data, for a plan."""
    from medseg.task import example

    return example(recipe, batch, device)


def folder(recipe: SegRecipe) -> str:
    """The name of a member's run folder."""
    return f"{recipe.name}-{recipe.signature[:8]}"


def check_early(recipes: Sequence[SegRecipe]) -> None:
    """Refuse what needs no data to be seen, before hours of preparation."""
    spacings = {recipe.data.spacing_mm for recipe in recipes}
    if len(spacings) > 1:
        raise UserError(f"the members need caches of different spacing {sorted(spacings)} mm: run them as two sweeps.")
    check_used(recipes)
    for recipe in recipes:
        check_network(recipe)


def prepare(data: Path, out: Path, recipes: Sequence[SegRecipe], options: Any) -> Path:
    """The sweep's cache, made or found; `options` has workers, label_map and strict."""
    from medseg.findings import report_scans
    from medseg.preparation import Preparation, prepare_dataset

    spacing = recipes[0].data.spacing_mm
    cache = prepare_dataset(data, out / "cache.h5", Preparation(spacing_mm=spacing), workers=options.workers,
                            label_map=options.label_map, strict=options.strict,
                            settled=any(out.glob("*/cache.json")))  # fmt: skip
    report_scans(cache)
    return cache


def look(data: Path, label_map: str) -> None:
    """Refuse a folder that is no data set, without reading a scan."""
    from medseg.msd import read_dataset

    read_dataset(data, label_map)


def expand(recipes: Sequence[SegRecipe], source: Any, cancers: Sequence[str] | None) -> list[SegRecipe]:
    """The sweep's members: one a recipe."""
    return list(recipes)


def wants_gpu(recipe: SegRecipe) -> bool:
    """Whether it takes weeks on a CPU."""
    return math.prod(recipe.data.crop) >= 96**3


def check(recipe: SegRecipe, cache: "Cache", weights: str) -> None:
    """Refuse before anything runs what would fail in the member's job."""
    from medseg.models import build_model

    split = make_task(recipe, cache).split
    if not split.val and not split.test:
        raise UserError(f"{recipe.name} holds out no case to judge by: --set data.val_fraction=0.2.")
    if weights == "validation" and not (split.val and split.test):
        raise UserError("--weights validation needs both val and test cases: --set data.test_fraction=0.2.")
    build_model(recipe)


def finish(sweep: Path, plan: dict[str, Any], weights: str) -> int:
    """Make ensemble, tables and figures; returns how many members are missing."""
    from medseg.table import finish

    return finish(sweep, sweep / plan["cache"], plan["members"], weights)


def predict(runs: Sequence[Path], weights: Sequence[float], place: Path, out: Path) -> tuple[str, int]:
    """Write label maps of the scans that `place` names; returns a sentence, and how many scans were set aside."""
    from medseg.prediction import predict

    return predict(runs, weights, place, out)


def evaluate(runs: Sequence[Path], place: Path, prepared: bool, label_map: str, out: Path) -> int:
    """Write the tables of members on a labelled data folder or, if `prepared`, a cache; returns how many cases could
    not be used."""
    from medseg.evaluation import evaluate

    return evaluate(runs, place, prepared, label_map, out)
