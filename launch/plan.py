"""A sweep as a value: what was asked for, its members, and plan.json in the sweep folder."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlaunch.tasks import DOORS, find_recipe, find_sweep, read_recipe
from medtrain.errors import UserError
from medtrain.files import read_json, write_json
from medtrain.paths import escapes
from medtrain.recipe import Recipe, build
from medtrain.run_folder import owner_of
from medtrain.settings import check_settings
from medtrain.wording import listed, plain

PLAN = "plan.json"
CACHE = "cache.h5"
OTHER = "{} holds another sweep: give another --out, or the options that it was made with."


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was typed; it stands in plan.json, so that `--resume DIR` needs nothing else."""

    sweep: str
    data: str
    sets: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    seeds: int = 1
    folds: int = 0
    cancers: tuple[str, ...] = ()
    label_map: str = "auto"
    strict: bool = False
    weights: str = "equal"
    workers: int = 1
    processes: int = 1
    nodes: int = 1
    cluster: str = ""
    cluster_file: str = ""
    time: str = ""
    throttle: int = 0

    def recipes(self) -> list[Recipe]:
        """The sweep's recipes with overrides, chosen models, folds and seeds, in the order of the tables."""
        names = find_sweep(self.sweep).SWEEPS[self.sweep]
        base = [find_recipe(name).override(list(self.sets)) for name in names]
        if self.models:
            known = {recipe.model.name: recipe for recipe in base} | dict(zip(names, base, strict=True))
            unknown = [model for model in self.models if model not in known]
            if unknown:
                raise UserError(f"--models {unknown[0]}: {self.sweep} has {', '.join(r.model.name for r in base)}.")
            base = [recipe for recipe in base if {recipe.model.name, recipe.name} & set(self.models)]
        return [
            recipe.override([*fold, *seed])
            for recipe in base
            for fold in _folds(self.folds)
            for seed in _seeds(recipe, self.seeds)
        ]


def check_early(recipes: Sequence[Recipe], request: Request) -> None:
    """Refuse what needs no data to be seen, before hours of preparation or of waiting in a queue."""
    door = find_sweep(request.sweep)
    for name, default in door.UNUSED_OPTIONS.items():
        if getattr(request, name) != default:
            raise UserError(f"--{name.replace('_', '-')} means nothing for {request.sweep}: leave it out.")
    door.check_early(recipes)
    for recipe in recipes:
        check_settings(recipe, request.nodes * request.processes)


def slow_without_gpu(recipes: Sequence[Recipe]) -> list[str]:
    """The names of recipes whose training takes days or weeks on a CPU."""
    return list(dict.fromkeys(recipe.name for recipe in recipes if DOORS[recipe.task].wants_gpu(recipe)))


def say_slow(recipes: Sequence[Recipe], why: str) -> None:
    """Print a note where recipes that want a GPU are to train without, and which ones do not."""
    if slow := slow_without_gpu(recipes):
        smaller = DOORS[recipes[0].task].CPU_RECIPES
        print(f"note: {why}; {listed(slow, 4)} will take days to weeks ({smaller} are for CPUs)", flush=True)


def check_place(out: Path) -> None:
    """Refuse a folder for a sweep that is a run's or a data set's."""
    if owner := owner_of(out, sweep=False):
        raise UserError(f"{out} belongs to {owner}: give another --out.")


def check_same(out: Path, there: dict[str, Any], planned: dict[str, Any]) -> None:
    """Refuse to go on with a sweep of other members or other data."""
    if _folders(there) != _folders(planned) or _data(there) != _data(planned):
        raise UserError(OTHER.format(out))


def check_keeps(out: Path, there: dict[str, Any], planned: dict[str, Any]) -> None:
    """Refuse to forget members that are trained, or to go on with other data; further members are welcome."""
    left = [name for name in _folders(there) if name not in _folders(planned)]
    if _data(there) != _data(planned) or any(any((out / name).glob("checkpoint_*.pt")) for name in left):
        raise UserError(OTHER.format(out))


def _folders(plan: dict[str, Any]) -> list[str]:
    return [member["folder"] for member in plan["members"]]


def _data(plan: dict[str, Any]) -> tuple[str, str, bool]:
    request = read_request(plan)
    return request.data, request.label_map, request.strict


def _folds(folds: int) -> list[list[str]]:
    if folds == 0:
        return [[]]
    if folds < 2:
        raise UserError(f"--folds {folds}: give at least 2, or leave it out.")
    return [[f"data.folds={folds}", f"data.fold={fold}"] for fold in range(folds)]


def _seeds(recipe: Recipe, seeds: int) -> list[list[str]]:
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: give at least 1.")
    first = recipe.train.seed
    return [[f"train.seed={first + n}"] for n in range(seeds)] if seeds > 1 else [[]]


def label(recipe: Recipe) -> str:
    """How the tables name a member: its recipe, and its fold and seed where these are not the usual ones."""
    data = recipe.data  # type: ignore[attr-defined]
    parts = [f"fold {data.fold}"] if getattr(data, "folds", 0) > 1 else []
    if recipe.train.seed:
        parts.append(f"seed {recipe.train.seed}")
    return f"{recipe.name} ({', '.join(parts)})" if parts else recipe.name


def make_plan(request: Request, recipes: Sequence[Recipe], cache: str = CACHE) -> dict[str, Any]:
    """plan.json: one folder a member, named by recipe and signature."""
    door = find_sweep(request.sweep)
    members = [
        {"recipe": r.name, "label": label(r), "folder": door.folder(r), "signature": r.signature,
         "settings": json.loads(r.to_json())}
        for r in recipes
    ]  # fmt: skip
    folders = [member["folder"] for member in members]
    if len(set(folders)) < len(folders):
        raise UserError("two members of this sweep are the same: leave out the --set that makes them so.")
    return {"task": door.TASK, "cache": cache, "request": dataclasses.asdict(request), "members": members}


def write_plan(out: Path, plan: dict[str, Any]) -> None:
    """Write plan.json."""
    write_json(out / PLAN, plan)


def read_plan(out: Path) -> dict[str, Any]:
    """Read plan.json; raises UserError where the folder is no sweep of this version."""
    path = out / PLAN
    if not path.is_file():
        raise UserError(f"{out} is not a sweep folder (no {PLAN}): name what launch/sweep.py wrote.")
    plan = read_json(path)
    try:
        texts = [m[key] for m in plan["members"] for key in ("recipe", "label", "signature")]
        names = [plan["cache"], *(m["folder"] for m in plan["members"])]
        intact = plan["task"] in DOORS and all(isinstance(m["settings"], dict) for m in plan["members"])
        intact = intact and all(map(_is_plain, names)) and len(set(names)) == len(names)
        intact = intact and all(isinstance(text, str) and text and plain(text) for text in texts)
        read_request(plan)
    except (KeyError, TypeError, UserError):
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged or of another version of this program: run the sweep again.")
    for name in names[1:]:
        if (out / name).is_symlink() and escapes(out, out / name):
            raise UserError(
                f"{out / name} is a link that leaves the sweep's folder: move the run back, or allow links with "
                "MEDTRAIN_FOLLOW_LINKS=1."
            )
    return plan


def _is_plain(name: Any) -> bool:
    """Whether a name is of something in the folder itself."""
    return (
        isinstance(name, str)
        and name == Path(name).name
        and name not in ("", "..")
        and plain(name)
        and len(name.encode()) < 256
    )


def read_request(plan: dict[str, Any]) -> Request:
    """What was typed, as plan.json holds it; raises UserError."""
    return build(Request, plan["request"], f"{PLAN}, request")


def read_recipes(plan: dict[str, Any], origin: Path) -> list[Recipe]:
    """The members' recipes."""
    return [read_recipe(json.dumps(member["settings"]), str(origin / PLAN)) for member in plan["members"]]
