"""The recipes of classification as values."""

import pytest

from medcls.door import folder
from medcls.recipes import RECIPES, SWEEPS, ClsRecipe, slug


@pytest.mark.parametrize("name", RECIPES)
def test_json_and_back(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert RECIPES[name].__doc__
    assert ClsRecipe.from_json(recipe.to_json()) == recipe


def test_sweeps_name_recipes_of_the_four_networks() -> None:
    for names in SWEEPS.values():
        networks = [RECIPES[name]().model.name for name in names]
        assert networks == ["densenet201", "mobilenetv3_small_100", "resnetv2_50", "vgg19"]


def test_the_published_recipe() -> None:
    recipe = RECIPES["published_resnetv2"]()
    optim = recipe.optim
    assert (optim.name, optim.lr, optim.schedule) == ("adam", 0.01, "plateau")
    assert (optim.factor, optim.patience, optim.min_lr) == (0.5, 5, 1e-3)
    assert recipe.data.split == "group"  # what was published is data.split=random, by name
    assert recipe.augment.operations == ()


def test_folders_tell_cancer_and_recipe_and_where_weights_lie_does_not_matter() -> None:
    recipe = RECIPES["multicancer_vgg19"]().override(["data.cancer=Lung and Colon Cancer"])
    assert folder(recipe).startswith("multicancer_vgg19-lung_and_colon_cancer-")
    assert folder(recipe.override(["model.weights_folder=/elsewhere"])) == folder(recipe)
    assert folder(recipe.override(["data.split=random"])) != folder(recipe)
    assert slug("Ä Ö!") == "ä_ö"
    assert slug("!") == "images"
    assert RECIPES["multicancer_all"]().data.cancer == "every"
