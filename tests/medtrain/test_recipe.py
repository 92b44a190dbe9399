from dataclasses import replace
from pathlib import Path

import pytest
from launch_helpers import run_main

from medcls.recipes import RECIPES as CLS_RECIPES
from medseg.recipes import RECIPES, SegRecipe
from medtrain.errors import UserError
from medtrain.recipe import described, flat


@pytest.mark.parametrize("name", [*RECIPES, *CLS_RECIPES])
def test_json_round_trip(name: str) -> None:
    recipe = {**RECIPES, **CLS_RECIPES}[name]()
    assert recipe.name == name
    again = type(recipe).from_json(recipe.to_json())
    assert again == recipe
    assert again.signature == recipe.signature


def test_whole_numbers_in_fields_of_floats_change_no_signature() -> None:
    plain = RECIPES["brats_segresnet"]()
    whole = replace(plain, augment=replace(plain.augment, degrees=25, zoom_range=(1, 2)))
    again = SegRecipe.from_json(whole.to_json())
    assert again.signature == whole.signature
    assert again.signature != plain.signature


@pytest.mark.parametrize("name", [*RECIPES, *CLS_RECIPES])
def test_what_is_shown_can_be_set(name: str) -> None:
    recipe = {**RECIPES, **CLS_RECIPES}[name]()
    shown = described(recipe)
    assert {line.partition("=")[0] for line, _ in shown} == set(flat(recipe)) - {"name", "task"}
    assert recipe.override([line for line, _ in shown]).signature == recipe.signature
    assert recipe.override([line for line, _ in shown]) == recipe
    told = dict(shown)
    assert told[f"train.batch={recipe.train.batch}"] == "at least 1, at most 65536"
    assert told["train.strategy=" + recipe.train.strategy] == "auto, single, ddp, deepspeed"


def test_train_shows_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("train", "brats_unetr", "--show", "--set", "data.crop=64,64,96") == 0
    assert "data.crop=64,64,96 " in capsys.readouterr().out


def test_override_is_typed() -> None:
    recipe = RECIPES["brats_segresnet"]().override(
        ["optim.lr=3e-4", "data.crop=64,64,32", "train.deterministic=true", "model.name=unetr", "data.holdout=a,b"]
    )
    assert recipe.optim.lr == 3e-4
    assert recipe.data.crop == (64, 64, 32)
    assert recipe.train.deterministic is True
    assert recipe.model.name == "unetr"
    assert recipe.data.holdout == ("a", "b")


@pytest.mark.parametrize("field", ["model.weights", "model.weights_folder", "train.deepspeed"])
def test_paths_are_those_of_the_folder_that_they_were_typed_in(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, key = field.split(".")

    def taken(text: str) -> str:
        return getattr(getattr(CLS_RECIPES["multicancer_vgg19"]().override([f"{field}={text}"]), section), key)

    (tmp_path / "my place").mkdir()
    monkeypatch.chdir(tmp_path / "my place")
    monkeypatch.setenv("HOME", "/home/me")
    assert taken("my.pt") == f"{tmp_path}/my place/my.pt"
    assert taken("~/my.pt") == "/home/me/my.pt"
    assert taken("/data/my.pt") == "/data/my.pt"
    assert taken("") == ""
    with pytest.raises(UserError, match=rf"--set {field}=~nobody-here/x: write the whole path"):
        taken("~nobody-here/x")
    for word in ("imagenet", "none"):
        assert taken(word) == (word if field == "model.weights" else f"{tmp_path}/my place/{word}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim.lrr=1", "optim.lr"),
        ("lr=1", "optim.lr"),
        ("optim=1", "optim."),
        ("optim.lr", "section.key=value"),
        ("optim.lr=fast", "needs a number"),
        ("train.batch=1.5", "whole number"),
        ("train.batch=true", "whole number"),
        ("train.deterministic=1", "true or false"),
        ("data.crop=64,64", "3 values"),
        ("data.crop=a,b,c", "whole number"),
        ("optim.name=lion", "adam, adamw, sgd"),
        ("name=x", "no such field"),
    ],
)
def test_a_wrong_override_says_what_is_right(text: str, words: str) -> None:
    with pytest.raises(UserError, match="--set") as caught:
        RECIPES["brats_segresnet"]().override([text])
    assert words in str(caught.value)


def test_signature_ignores_what_does_not_change_the_result() -> None:
    recipe = RECIPES["brats_segresnet"]()
    assert recipe.override(["train.workers=9", "train.log_every=3"]).signature == recipe.signature
    assert recipe.override(["train.seed=1"]).signature != recipe.signature


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"name": 1}', RECIPES["brats_segresnet"]().to_json().replace("0.9", '"x"')]
)
def test_a_damaged_file_is_a_user_error(text: str) -> None:
    with pytest.raises(UserError, match=r"run/recipe\.json"):
        SegRecipe.from_json(text, "run/recipe.json")


@pytest.mark.parametrize(("said", "meant"), [("false", "off"), ("true", "on")])
def test_a_layout_as_earlier_recipes_have_it_is_read(said: str, meant: str) -> None:
    recipe = RECIPES["brats_segresnet"]()
    text = recipe.to_json().replace('"channels_last": "auto"', f'"channels_last": {said}')
    assert f'"channels_last": {said}' in text
    assert type(recipe).from_json(text).train.channels_last == meant
