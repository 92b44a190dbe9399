"""A run's folder: whose it is, of which recipe and data, and whether the run is done."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medtrain.errors import UserError
from medtrain.files import read_json, remove_leftovers, write_json, write_text
from medtrain.recipe import Recipe, differing
from medtrain.wording import listed

RECIPE, CACHE, SPLIT = "recipe.json", "cache.json", "split.json"  # there while it trains
DONE, FAILED, ROWS = "done.json", "failed.json", "cases.csv"  # at its end


def open_run(recipe: Recipe, cache: Any, out: Path) -> None:
    """Make the run folder; raises UserError where a run of another recipe or on other data lies there."""
    there, data = out / RECIPE, out / CACHE
    if there.exists():
        other = type(recipe).from_json(there.read_text(encoding="utf-8", errors="replace"), str(there))
        if other.signature != recipe.signature:
            fields = listed(differing(recipe, other))
            raise UserError(
                f"{out} holds a run of another recipe ({fields}): give another --out or remove that folder."
            )
        if read_json(data).get("fingerprint") != cache.fingerprint:
            raise UserError(f"{out} was trained on other data than {cache.path} holds: give another --out.")
    remove_leftovers(out)
    write_json(data, {"path": str(cache.path.resolve()), "fingerprint": cache.fingerprint})
    write_text(there, recipe.to_json())


def owner_of(out: Path, *, sweep: bool = True) -> str:
    """What a folder that is to be written into belongs to: a data set, a run or (if asked) a sweep; else no words."""
    found = {"recipe.json": "a run", "dataset.json": "a data set", **({"plan.json": "a sweep"} if sweep else {})}
    for name, what in found.items():
        if (out / name).exists():
            return what
    part_of_set = out.resolve().name.startswith(("images", "labels"))  # of the Decathlon's form
    return "a data set" if part_of_set and (out.resolve().parent / "dataset.json").exists() else ""


def read_done(path: Path, **kinds: Any) -> dict[str, Any]:
    """Read a run's done.json, whose entries must be of these types; raises UserError."""
    done = read_json(path)
    for name, kind in kinds.items():
        if not isinstance(done.get(name), kind):
            raise UserError(f"{path} is damaged ({name}): remove it, and train that run to its end again.")
    return done


def is_done(run: Path) -> bool:
    """Whether a member has left all that the tables need."""
    return (run / DONE).is_file() and (run / ROWS).is_file()


def why_missing(run: Path) -> str:
    """What a member that is not done says of itself."""
    failed = run / FAILED
    return str(read_json(failed).get("reason")) if failed.is_file() else "did not finish"


def check_some_done(sweep: Path, members: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError where none of plan.json's members is done."""
    runs = {member["label"]: sweep / member["folder"] for member in members}
    if any(map(is_done, runs.values())):
        return
    told = next((f"{label}: {why_missing(run)}" for label, run in runs.items()), "the plan is empty")
    raise UserError(f"{sweep} has no finished member ({told}): see {sweep / 'jobs'}, then run it again.")


def check_trained_on(run: Path, cache: Any) -> None:
    """UserError where a run's data were not what a cache holds."""
    if read_json(run / CACHE).get("fingerprint") != cache.fingerprint:
        raise UserError(f"{run} was trained on other data than {cache.path} holds: train it again elsewhere.")
