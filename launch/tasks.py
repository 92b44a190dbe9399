"""The two tasks as the programs see them, and recipes by name. Each task has a `door` with the same functions."""

import difflib
from pathlib import Path
from typing import Any

from medcls import door as images
from medlaunch.door import Door
from medseg import door as volumes
from medtrain.errors import UserError
from medtrain.files import parse_json_text
from medtrain.run_folder import RECIPE
from medtrain.wording import listed, shown

DOORS: dict[str, Door] = {volumes.TASK: volumes, images.TASK: images}


def recipe_names() -> list[str]:
    """Every recipe that can be named."""
    return [name for door in DOORS.values() for name in door.RECIPES]


def sweep_names() -> list[str]:
    """Every sweep that can be named."""
    return [name for door in DOORS.values() for name in door.SWEEPS]


def find_recipe(name: str) -> Any:
    """The recipe of that name; raises UserError with near names."""
    for door in DOORS.values():
        if name in door.RECIPES:
            return door.RECIPES[name]()
    near = difflib.get_close_matches(name, recipe_names(), 3, 0.4) or recipe_names()
    raise UserError(f"there is no recipe {shown(name, 60)!r}: choose {listed(near, 6)}.")


def find_sweep(name: str) -> Door:
    """The door of the task that a sweep belongs to."""
    for door in DOORS.values():
        if name in door.SWEEPS:
            return door
    raise UserError(f"there is no sweep {shown(name, 60)!r}: choose {listed(sweep_names(), 8)}.")


def read_recipe(text: str, origin: str) -> Any:
    """A recipe from its JSON text, of whichever task; raises UserError."""
    try:
        door = DOORS[parse_json_text(text)["task"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{origin} is no recipe of this program: take it from an intact run folder.") from None
    return door.Recipe.from_json(text, origin)


def recipe_of_run(run: Path) -> Any:
    """The recipe that a run folder was trained by; raises UserError."""
    path = run / RECIPE
    if not path.is_file():
        raise UserError(f"{path} is not there: name the folder of a run that has trained.")
    return read_recipe(path.read_text(encoding="utf-8", errors="replace"), str(path))


def door_of_run(run: Path) -> Door:
    """The door of the task that a run folder belongs to; raises UserError."""
    return DOORS[recipe_of_run(run).task]
