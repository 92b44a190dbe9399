"""What the programs share on the command line: finding recipes by name."""

import difflib

from medseg import recipes
from medseg.recipes import SegRecipe
from medtrain.errors import UserError


def recipe_names() -> list[str]:
    """Every recipe that can be named."""
    return list(recipes.RECIPES)


def find_recipe(name: str) -> SegRecipe:
    """The recipe of that name; raises UserError with near names."""
    if name not in recipes.RECIPES:
        near = difflib.get_close_matches(name, recipes.RECIPES, 3, 0.4) or list(recipes.RECIPES)
        raise UserError(f"there is no recipe {name!r}: choose {', '.join(near)}.")
    return recipes.RECIPES[name]()
