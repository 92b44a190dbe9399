"""Damaged and hostile recipes, cluster files and command lines: one sentence that names the thing, exit code 2."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from hostile import msd_folder, nested
from launch_helpers import check_refused, run_main

Change = Callable[[Path], object]
NAN, INF = float("nan"), float("inf")


def text(content: str | bytes) -> Change:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def field(*keys: str, value: Any) -> Change:
    """Another value of a field."""

    def apply(path: Path) -> None:
        recipe = json.loads(path.read_text())
        place = recipe
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        path.write_text(json.dumps(recipe))

    return apply


def without(section: str, key: str) -> Change:
    def apply(path: Path) -> None:
        recipe = json.loads(path.read_text())
        del recipe[section][key]
        path.write_text(json.dumps(recipe))

    return apply


RECIPES: dict[str, tuple[Change, str]] = {
    "empty": (text(""), "no recipe|not JSON"),
    "not JSON": (text("{"), "no recipe|not JSON"),
    "not UTF-8": (text(b'{"task": "\xff"}'), "no recipe|not JSON|fields"),
    "nested": (text(nested(99999)), "no recipe|not JSON"),
    "a list": (text("[]"), "no recipe|fields"),
    "a text": (text('"brats"'), "no recipe|fields"),
    "no task": (text("{}"), "no recipe|fields"),
    "an unknown task": (field("task", value="lungs"), "no recipe|field task"),
    "the other task": (field("task", value="multicancer"), "fields|field task"),
    "a task that is a list": (field("task", value=["brats"]), "no recipe|field task"),
    "a name that leaves": (field("name", value="../../x"), "no recipe's name"),
    "an absolute name": (field("name", value="/tmp/x"), "no recipe's name"),
    "a name of two lines": (field("name", value="a\nb"), "no recipe's name"),
    "a name of 9999 letters": (field("name", value="x" * 9999), "no recipe's name"),
    "an unknown field": (field("data", "colour", value=1), "unknown fields \\(colour\\)"),
    "10000 unknown fields": (field("data", value={f"f{n}": n for n in range(10000)}), "more"),
    "a field is missing": (without("optim", "lr"), "missing or unknown fields \\(lr\\)"),
    "a section is a number": (field("optim", value=3), "unknown fields"),
    "a rate is a text": (field("optim", "lr", value="fast"), "field lr: needs a number"),
    "a rate is NaN": (field("optim", "lr", value=NAN), "field lr: needs"),
    "a rate is infinite": (field("optim", "lr", value=INF), "field lr: needs"),
    "a rate of 400 digits": (field("optim", "lr", value=10**400), "field lr: needs"),
    "a rate below 0": (field("optim", "lr", value=-1.0), "field lr: needs at least 0"),
    "a rate is true": (field("optim", "lr", value=True), "field lr: needs"),
    "a batch of -1": (field("train", "batch", value=-1), "field batch: needs at least 1"),
    "a batch of 0": (field("train", "batch", value=0), "field batch: needs at least 1"),
    "half a batch": (field("train", "batch", value=1.5), "field batch: needs a whole number"),
    "10^12 epochs in a batch": (field("train", "batch", value=10**12), "at most"),
    "a seed below 0": (field("train", "seed", value=-3), "at least 0"),
    "an unknown precision": (field("train", "precision", value="fp7"), "needs one of"),
    "a precision that is a list": (field("train", "precision", value=["bf16"]), "needs one of"),
    "a crop of two": (field("data", "crop", value=[32, 32]), "list of 3"),
    "a crop of 0": (field("data", "crop", value=[0, 32, 32]), "at least 1"),
    "a crop of texts": (field("data", "crop", value=["a", "b", "c"]), "whole number"),
    "a crop of lists": (field("data", "crop", value=[[1], [2], [3]]), "whole number"),
    "a share above 1": (field("data", "val_fraction", value=1.5), "below 1"),
    "flags as texts": (field("train", "deterministic", value="yes"), "true or false"),
    "flags as numbers": (field("train", "deterministic", value=1), "true or false"),
}  # fmt: skip


READ = [(name, program) for name in RECIPES for program in ("predict", "train")]


@pytest.mark.parametrize(("name", "program"), READ)
def test_recipes(
    name: str, program: str, copy: Callable[[str], Path], phantoms: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, out = copy("brats") / "member", tmp_path / "out"
    change, words = RECIPES[name]
    change(run / "recipe.json")
    before = sorted(path.name for path in run.iterdir())
    if program == "predict":
        code = run_main("predict", "--members", run, "--image", phantoms / "imagesTr", "--out", out)
    else:
        sets = [part for item in TINY for part in ("--set", item)]
        code = run_main("train", "brats_segresnet_demo", "--cache", run.parent / "cache.h5", "--out", run, *sets)
    check_refused(code, capfd.readouterr().err, str(run / "recipe.json"), words, out)
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_recipe_of_before_a_field_that_changes_no_result(copy: Callable[[str], Path]) -> None:
    run = copy("brats") / "member"
    without("data", "verify")(run / "recipe.json")
    sets = [part for item in TINY for part in ("--set", item)]
    assert run_main("train", "brats_segresnet_demo", "--cache", run.parent / "cache.h5", "--out", run, *sets) == 0


CLUSTERS: dict[str, tuple[Change, str]] = {
    "empty": (text(""), "no cluster 'lab'"),
    "not TOML": (text("[lab\n"), "not TOML"),
    "not UTF-8": (text(b'[lab]\npartition = "\xff"\n'), "not TOML"),
    "nested": (text(f"[lab]\nmodules = {nested(99999)}\n"), "not TOML"),
    "a number of 10000 digits": (text(f"[lab]\nthrottle = {'9' * 10000}\n"), "not TOML"),
    "200 MB": (lambda path: (path.write_text(""), os.truncate(path, 200 << 20)), "has more than 4 MB"),
    "twice the same key": (text('[lab]\npartition = "a"\npartition = "b"\n'), "not TOML"),
    "no table": (text("lab = 3\n"), "no table"),
    "a list of tables": (text("[[lab]]\n"), "no table"),
    "an unknown key": (text('[lab]\npartitoin = "gpu"\n'), "line 2: there is no key 'partitoin'.*partition"),
    "a key of 9999 letters": (text(f"[lab]\n{'x' * 9999} = 1\n"), "there is no key"),
    "an ill-typed key": (text("[lab]\ngpus_per_node = true\n"), "must be a whole number"),
    "half a GPU": (text("[lab]\ngpus_per_node = 0.5\n"), "must be a whole number"),
    "GPUs below 0": (text("[lab]\ngpus_per_node = -1\n"), "at least 0"),
    "10^18 GPUs": (text("[lab]\ngpus_per_node = 1000000000000000000\n"), "below"),
    "a table for a text": (text("[lab.partition]\na = 1\n"), "must be a text"),
    "texts that are numbers": (text("[lab]\nmodules = [1, 2]\n"), "list of texts"),
    "no time": (text('[lab]\ntime = "tomorrow"\n'), "is no time"),
    "no memory": (text('[lab]\nmem = "much"\n'), "is no memory"),
    "a partition of two lines": (text('[lab]\npartition = "a\\n#SBATCH --wrap=x"\n'), "line break"),
    "an option of two lines": (text('[lab]\n[lab.sbatch]\ncomment = "a\\nb"\n'), "one line"),
    "an option that is a list": (text("[lab]\n[lab.sbatch]\ncomment = [1]\n"), "one line"),
    "a text of 9999 letters": (text(f'[lab]\ntime = "{"x" * 9999}"\n'), "is no time"),
    "1000 clusters": (text("".join(f"[c{n}]\n" for n in range(1000))), "no cluster 'lab'"),
    "a folder": (lambda path: path.mkdir(), "is not there"),
}


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_files(name: str, tmp_path: Path, slurm: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, words = CLUSTERS[name]
    path, out = tmp_path / "bad.toml", tmp_path / "out"
    change(path)
    code = run_main(
        "sweep", "brats_demo", "--data", msd_folder(tmp_path / "data"), "--out", out, "--cluster", "lab",
        "--cluster-file", path, "--dry-run",
    )  # fmt: skip
    check_refused(code, capfd.readouterr().err, str(path), words, out)


LINES: dict[str, tuple[tuple[str, ...], str]] = {
    "a recipe of 9999 letters": (("train", "x" * 9999, "--cache", "c", "--out", "OUT"), "there is no recipe"),
    "a recipe of two lines": (("train", "a\nb", "--cache", "c", "--out", "OUT"), "there is no recipe"),
    "a field of 9999 letters": (
        ("train", "brats_segresnet_demo", "--cache", "c", "--out", "OUT", "--set", "x" * 9999 + "=1"),
        "no such field",
    ),
    "no field's value": (
        ("train", "brats_segresnet_demo", "--cache", "c", "--out", "OUT", "--set", "x" * 9999),
        "has no '='",
    ),
    "a rate of NaN": (
        ("train", "brats_segresnet_demo", "--cache", "c", "--out", "OUT", "--set", "optim.lr=nan"),
        "optim.lr=nan: needs",
    ),
    "a batch of 5000 digits": (
        ("train", "brats_segresnet_demo", "--cache", "c", "--out", "OUT", "--set", f"train.batch={'9' * 5000}"),
        "train.batch=9+…9+: needs",
    ),
    "a spacing of atoms": (("prepare", "brats", "--data", "d", "--out", "OUT/c.h5", "--spacing-mm", "1e-9"), "voxel"),
    "a spacing of NaN": (("prepare", "brats", "--data", "d", "--out", "OUT/c.h5", "--spacing-mm", "nan"), "voxel"),
    "weights of NaN": (("predict", "--members", "a", "--image", ".", "--out", "OUT", "--weights", "nan"), "--weights"),
    "an unknown sweep": (("sweep", "x" * 999, "--data", "d", "--out", "OUT"), "there is no sweep"),
}


@pytest.mark.parametrize("name", LINES)
def test_command_lines(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words, told = LINES[name]
    out = tmp_path / "out"
    code = run_main(*(word.replace("OUT", str(out)) for word in words))
    check_refused(code, capfd.readouterr().err, "", told, out)
