"""Which class the positive scores are of."""

from collections.abc import Callable
from pathlib import Path

import pytest

from medcls.cache import ImageCache
from medcls.folders import PUBLISHED
from medcls.positive import choose_positive
from medcls.recipes import ClsRecipe
from medcls.task import ClsTask
from medtrain.errors import UserError


@pytest.mark.parametrize(
    ("classes", "positive"),
    [
        (("cancer", "healthy"), "cancer"),
        (("healthy", "cancer"), "cancer"),
        (("Tumor", "normal"), "Tumor"),
        (("glioma", "NoTumor"), "glioma"),
        (("HER2 negative", "HER2 positive"), "HER2 positive"),
        (("carcinoma", "non-cancer"), "carcinoma"),
        (("abnormal", "other"), "other"),  # no word of absence: the second
        (("normal", "not_normal"), "not_normal"),  # both have one: the second
        (("0", "1"), "1"),
        (("HGG", "LGG"), "HGG"),
        (("Melanoma", "Nevus"), "Melanoma"),
        (("Cancerous", "Noncancerous"), "Cancerous"),
        (("Tumor", "Tumour-free"), "Tumor"),
        (("bösartig", "gutartig"), "bösartig"),
        (("node", "nodule"), "nodule"),  # these begin with "no" by chance
        *((names, names[1]) for names in PUBLISHED.values() if len(names) == 2),
    ],
)
def test_a_word_of_absence_decides(classes: tuple[str, str], positive: str) -> None:
    assert classes[choose_positive(classes) or 0] == positive


def test_a_name_decides_and_more_classes_have_none() -> None:
    assert choose_positive(["cancer", "healthy"], "healthy") == 1
    assert choose_positive(["a", "b"], "a") == 0
    assert choose_positive(["a", "b", "normal"]) is None
    with pytest.raises(UserError, match=r"data.positive=tumour: no such class; choose cancer, healthy\."):
        choose_positive(["cancer", "healthy"], "tumour")
    with pytest.raises(UserError, match="of 3 classes none is positive"):
        choose_positive(["a", "b", "c"], "a")


def test_a_recipe_names_it_without_another_signature(image_cache: Path, tiny_images: Callable[..., ClsRecipe]) -> None:
    recipe = tiny_images("data.positive=oral_normal")
    task = ClsTask(recipe, ImageCache(image_cache))
    assert task.about()["positive"] == "oral_normal"
    assert recipe.signature == tiny_images().signature
    assert ClsTask(tiny_images(), ImageCache(image_cache)).about()["positive"] == "oral_scc"
    brain = ClsTask(tiny_images("data.cancer=Brain Cancer"), ImageCache(image_cache))
    assert brain.about()["positive"] == ""
    with pytest.raises(UserError, match="choose oral_normal, oral_scc"):
        ClsTask(tiny_images("data.positive=x"), ImageCache(image_cache))
