"""What the launcher asks of cancer classification; everything heavy is imported inside."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcls.folders import Cancers, choose_cancer
from medcls.recipes import RECIPES as RECIPES
from medcls.recipes import SWEEPS as SWEEPS
from medcls.recipes import ClsModel, ClsRecipe, slug
from medtrain.errors import UserError

if TYPE_CHECKING:
    from medcls.cache import ImageCache
    from medcls.task import ClsTask
    from medtrain.estimate import Example

TASK = "multicancer"
Recipe = ClsRecipe
SCORE_NOTE = "scores"
MEMORY_FIELDS = "train.batch or data.size"  # what to lower where it does not suffice
UNUSED_OPTIONS = {"label_map": "auto", "weights": "equal"}  # of a sweep, with their defaults
CPU_RECIPES = "the demo recipes"  # what is made for CPUs
FINISH_ON_GPU = False  # the tables are made of the members' rows
OUTPUTS = {"table.csv": "table", "tables": "each cancer", "cases.csv": "every image", "audit.csv": "duplicates"}


def open_cache(path: Path) -> "ImageCache":
    """A cache of images."""
    from medcls.cache import ImageCache

    return ImageCache(path)


def make_task(recipe: ClsRecipe, cache: "ImageCache") -> "ClsTask":
    """The task that the engine trains."""
    from medcls.task import ClsTask

    return ClsTask(recipe, cache)


def example(recipe: ClsRecipe, batch: int, device: Any) -> "Example":
    """A step without data, for a plan."""
    from medcls.task import example

    return example(recipe, batch, device)


def folder(recipe: ClsRecipe) -> str:
    """The name of a member's run folder."""
    return f"{recipe.name}-{slug(recipe.data.cancer)}-{recipe.signature[:8]}"


def check_early(recipes: Sequence[ClsRecipe]) -> None:
    """Refuse what needs no data to be seen, before hours of preparation."""
    from medcls.backbones import weights_file

    if all(r.model.name != "vgg19" and r.model.mlp_ratio != ClsModel().mlp_ratio for r in recipes):
        raise UserError(f"{recipes[0].name}: model.mlp_ratio is of VGG19 alone: leave it out.")
    for recipe in recipes:
        weights_file(recipe.model)


def prepare(data: Path, out: Path, recipes: Sequence[ClsRecipe], options: Any) -> Path:
    """The sweep's cache, made or found; `options` has workers and strict."""
    from medcls.preparation import prepare_folder

    return prepare_folder(data, out / "cache.h5", workers=options.workers, strict=options.strict)


def look(data: Path, label_map: str) -> Cancers:
    """The cancers of a data folder, without reading an image; raises UserError where it is none."""
    from medcls.folders import read_folders

    folders = read_folders(data)
    return Cancers(data, list(dict.fromkeys(cancer for cancer, _ in folders.classes)))


def expand(recipes: Sequence[ClsRecipe], source: "ImageCache | Cancers", cancers: Sequence[str]) -> list[ClsRecipe]:
    """The sweep's members: every recipe for every cancer, or for those named; "every" is one classifier of all."""
    named = {recipe.data.cancer for recipe in recipes} - {""}
    if named and cancers:
        raise UserError("--cancers and --set data.cancer say the same thing: leave one out.")
    known = source.cancers
    chosen = [choose_cancer(source, cancer) for cancer in cancers or sorted(named) or known]
    if len(set(chosen)) > 1 and any(recipe.data.positive for recipe in recipes):
        raise UserError("--set data.positive names a class of one cancer: choose that one with --cancers.")
    return [replace(r, data=replace(r.data, cancer=c)) for c in dict.fromkeys(chosen) for r in recipes]


def wants_gpu(recipe: ClsRecipe) -> bool:
    """Whether it takes days on a CPU."""
    return recipe.data.size >= 128


def check(recipe: ClsRecipe, cache: "ImageCache", weights: str) -> None:
    """Refuse before anything runs what would fail in the member's job."""
    make_task(recipe, cache).build_model()


def finish(sweep: Path, plan: dict[str, Any], weights: str) -> int:
    """Make ensembles, tables and figures; returns how many members are missing."""
    from medcls.table import finish

    return finish(sweep, open_cache(sweep / plan["cache"]), plan["members"])


def predict(runs: Sequence[Path], weights: Sequence[float], place: Path, out: Path) -> tuple[str, int]:
    """Write a CSV of class probabilities of the images that `place` names; returns a sentence, and how many images
    could not be read: each is a line of the CSV, with the reason."""
    from medcls.prediction import predict

    return predict(runs, weights, place, out)


def evaluate(runs: Sequence[Path], place: Path, prepared: bool, label_map: str, out: Path) -> int:
    """Scores on another data set are there for volumes only."""
    raise UserError(f"{runs[0]} is a run on images, evaluate.py is for volumes: give them to launch/predict.py.")
