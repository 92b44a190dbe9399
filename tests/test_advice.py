"""What messages, help texts and pages advise to set is a field of some recipe."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from medlaunch.tasks import find_recipe, recipe_names
from medtrain.recipe import field_names

ROOT = Path(__file__).resolve().parents[1]
CODE = ("kernels", "medtrain", "medseg", "medcls", "launch", "slurm")
SOURCES = [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]
PAGES = [*ROOT.glob("*.md"), *(path for folder in (*CODE, "tests") for path in (ROOT / folder).rglob("*.md")),
         *(ROOT / "slurm").glob("*.sh")]  # fmt: skip
KNOWN = {name for recipe in recipe_names() for name in field_names(find_recipe(recipe))}
SECTIONS = {name.split(".")[0] for name in KNOWN if "." in name}
# `--set key=`, or a section's field by its dotted name, as in "lower train.batch"
NAMED = re.compile(rf"--set ([a-z][\w.]*)=|(?<![\w./*-])((?:{'|'.join(sorted(SECTIONS))})\.[a-z_]\w*)(?![\w(/]|\.\w)")
EXAMPLES = {"section.key", *(path.name for path in (ROOT / "launch").glob("*.py"))}  # train.py is no field


def texts(path: Path) -> Iterator[str]:
    """Every text of a source: messages and docstrings, f-strings with what they put in left out; a page as it is."""
    if path.suffix != ".py":
        yield path.read_text(encoding="utf-8")
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def named(text: str) -> set[str]:
    """The fields that a text names."""
    return {one or other for one, other in NAMED.findall(text)}


@pytest.mark.parametrize("path", [*SOURCES, *sorted(PAGES)], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_field_that_is_named_exists(path: Path) -> None:
    assert {name for text in texts(path) for name in named(text)} - KNOWN - EXAMPLES == set()


def test_names_are_found_wherever_they_stand() -> None:
    assert named("bad: --set finetune.frozen_epochs=0 or train.zro=0, not --set smoothing=0.1; lower train.batch.") == {
        "finetune.frozen_epochs", "train.zro", "smoothing", "train.batch"}  # fmt: skip
    assert named("launch/train.py, model.state_dict() and `--set model.weights=FILE`") == {"model.weights"}
    found = {name for path in SOURCES for text in texts(path) for name in named(text)}
    assert {"finetune.freeze_epochs", "train.batch", "data.val_fraction", "data.cancer"} <= found
