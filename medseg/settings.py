"""What a network needs of its recipe, seen without torch: login nodes ask before anything is prepared or submitted."""

from collections.abc import Sequence
from dataclasses import fields

from medseg.recipes import SegModel, SegRecipe, window_of
from medtrain.errors import UserError

# Each network's name, and the fields of a recipe's model that it reads.
NETWORKS = {
    "segresnet": ("SegResNet", {"filters", "blocks_down", "blocks_up", "dropout"}),
    "unetr": ("UNETR", {"feature", "hidden", "mlp", "heads", "dropout"}),
    "swinunetr": ("SwinUNETR", {"feature", "dropout"}),
    "dynunet": ("DynUNet", {"filters", "levels", "supervised", "dropout"}),
}


def check_used(recipes: Sequence[SegRecipe]) -> None:
    """Raise UserError where a field of the model was set that none of the recipes' networks reads."""
    used = {"name", "kernels"}.union(*(NETWORKS[recipe.model.name][1] for recipe in recipes))
    for recipe in recipes:
        for name in (field.name for field in fields(SegModel) if field.name not in used):
            if getattr(recipe.model, name) != getattr(SegModel(), name):
                raise UserError(f"{recipe.name}: {NETWORKS[recipe.model.name][0]} has no model.{name}: leave it out.")


def check_network(recipe: SegRecipe) -> None:
    """Raise UserError where the network's fields, the crop and the window do not fit each other."""
    checks = {"segresnet": _segresnet, "unetr": _unetr, "swinunetr": _swinunetr, "dynunet": _dynunet}
    checks[recipe.model.name](recipe)


def _segresnet(recipe: SegRecipe) -> None:
    model = recipe.model
    if model.filters % 8 or len(model.blocks_up) != len(model.blocks_down) - 1:
        raise UserError(f"SegResNet needs model.filters in eights, not {model.filters}, and one model.blocks_up less "
                        f"than model.blocks_down, not {model.blocks_up} for {model.blocks_down}.")  # fmt: skip
    _divisible(recipe, 2 ** (len(model.blocks_down) - 1))


def _unetr(recipe: SegRecipe) -> None:
    model, crop = recipe.model, recipe.data.crop
    _divisible(recipe, 16)
    if model.hidden % model.heads:
        raise UserError(f"UNETR shares model.hidden={model.hidden} out among its heads, and model.heads={model.heads} "
                        "does not divide it: --set model.heads to one that does.")  # fmt: skip
    if window_of(recipe) != crop:
        raise UserError(f"UNETR needs evaluate.window to be its crop {crop}: --set evaluate.window=0,0,0.")


def _swinunetr(recipe: SegRecipe) -> None:
    feature = recipe.model.feature
    if feature % 12:
        raise UserError(f"SwinUNETR needs model.feature in twelves, not {feature}: --set model.feature=48.")
    _divisible(recipe, 32)
    _more_than_a_voxel(recipe, 32)


def _dynunet(recipe: SegRecipe) -> None:
    model = recipe.model
    if model.levels < 3 or model.supervised > model.levels - 2:
        raise UserError(
            f"DynUNet needs model.levels of at least 3 and model.supervised of at most {max(0, model.levels - 2)} "
            f"for {model.levels} levels."
        )
    _divisible(recipe, 2 ** (model.levels - 1))
    _more_than_a_voxel(recipe, 2 ** (model.levels - 1))


def _divisible(recipe: SegRecipe, multiple: int) -> None:
    """Raise UserError where halving sides until a voxel stands for `multiple` of them leaves a rest."""
    name = NETWORKS[recipe.model.name][0]
    for key, sides in (("data.crop", recipe.data.crop), ("evaluate.window", window_of(recipe))):
        if any(side % multiple for side in sides):
            better = ",".join(str(-(-side // multiple) * multiple) for side in sides)
            raise UserError(f"{name} needs sides that are multiples of {multiple}, not {sides}: --set {key}={better}.")


def _more_than_a_voxel(recipe: SegRecipe, multiple: int) -> None:
    """Raise UserError where one voxel is left: instance normalisation needs two in training."""
    if all(side == multiple for side in recipe.data.crop):
        name, better = NETWORKS[recipe.model.name][0], f"{2 * multiple},{multiple},{multiple}"
        raise UserError(f"{name} needs a crop of more than {multiple}^3 voxels: --set data.crop={better}, or larger.")
