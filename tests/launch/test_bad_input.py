"""What a careless user types: each is one sentence that names the thing, exit code 2, and nothing half-written."""

import os
from pathlib import Path

import pytest
from launch_helpers import run_main

from medseg.phantom import write_dataset

TRAIN = ("train", "brats_segresnet_demo", "--cache", "CACHE", "--out", "OUT/run", "--set", "data.spacing_mm=0", "--set",
         "data.crop=32,32,32", "--set")  # fmt: skip
IMAGES = ("train", "multicancer_mobilenetv3_demo", "--cache", "IMAGES", "--out", "OUT/run", "--set",
          "data.cancer=Oral Cancer", "--set")  # fmt: skip
CASES = [
    ((*TRAIN, "train.epochs=0"), "needs at least 1"),
    ((*TRAIN, "train.batch=0"), "needs at least 1"),
    ((*TRAIN, "train.validate_every=0"), "needs at least 1"),
    ((*TRAIN, "train.log_every=0"), "needs at least 1"),
    ((*TRAIN, "train.workers=-1"), "needs at least 0"),
    ((*TRAIN, "train.seed=-1"), "needs at least 0"),
    ((*TRAIN, "data.crop=0,32,32"), "needs at least 1"),
    ((*TRAIN, "data.crops_per_case=0"), "needs at least 1"),
    ((*TRAIN, "data.val_fraction=-0.1"), "below 1"),
    ((*TRAIN, "evaluate.overlap=1"), "below 1"),
    ((*TRAIN, "model.dropout=1"), "below 1"),
    ((*TRAIN, "optim.lr=-1"), "needs at least 0"),
    ((*TRAIN, "optim.ema=1"), "below 1"),
    ((*TRAIN, "augment.rotate=2"), "at most 1"),
    ((*TRAIN, "augment.noise_std=-1"), "needs at least 0"),
    ((*TRAIN, "augment.flip_axes=0,3"), "at most 2"),
    ((*TRAIN, "augment.zoom_range=1.2,0.8"), "the smaller number first"),
    (("train", "brats_segresnet_demo", "--cache", "FILE", "--out", "OUT/run"), "not an HDF5 file"),
    (("train", "brats_segresnet_demo", "--cache", "OUT", "--out", "OUT/run"), "is a folder"),
    ((*TRAIN[:5], "FILE/run", *TRAIN[6:], "train.epochs=1"), "FILE"),
    (("prepare", "brats", "--data", "DATA", "--out", "FILE"), "not overwritten"),
    (("prepare", "brats", "--data", "FILE", "--out", "OUT/c.h5"), "not a folder"),
    (("prepare", "verify", "FILE"), "not an HDF5 file"),
    (("prepare", "phantom", "--out", "OUT/p", "--cases", "0"), "at least 1"),
    (("prepare", "phantom", "--out", "FILE/p", "--cases", "1"), "FILE"),
    (("predict", "--members", "OUT", "--image", "FILE", "--out", "OUT/p"), "recipe.json is not there"),
    (("predict", "--members", "DATA", "--image", "DATA/none", "--out", "OUT/p"), "is not there: give a file"),
    (("evaluate", "--members", "OUT", "--data", "DATA", "--out", "OUT/e"), "recipe.json is not there"),
    (("evaluate", "--members", "OUT", "--data", "DATA", "--out", "DATA"), "not overwritten"),
    (("evaluate", "--members", "OUT", "--cache", "CACHE", "--label-map", "msd", "--out", "OUT/e"), "leave it out"),
    (("sweep", "brats_demo", "--data", "DATA", "--out", "FILE/s"), "FILE"),
    (("finish", "FILE"), "no plan.json"),
    (
        ("train", "multicancer_mobilenetv3_demo", "--cache", "IMAGES", "--out", "OUT/run"),
        "choose with --set data.cancer",
    ),
    ((*IMAGES, "data.cancer=Orl Cancer"), "choose Oral Cancer"),
    ((*IMAGES, "data.size=16"), "needs at least 32"),
    ((*IMAGES, "data.split=fold"), "needs one of group, random"),
    ((*IMAGES, "model.weights=FILE"), "not a file of weights"),
    ((*IMAGES, "model.name=vgg16"), "needs one of densenet201"),
    ((*IMAGES, "finetune.layer_decay=2"), "at most 1"),
    ((*IMAGES, "augment.ratio=0,1"), "at least 0.1"),
    ((*IMAGES, "augment.flip_axes=5"), "at most 1"),
    ((*IMAGES, "augment.scale=1,0.5"), "the smaller number first"),
    (("prepare", "multicancer", "--data", "FILE", "--out", "OUT/c.h5"), "is not a folder"),
    (("prepare", "multicancer", "--data", "OUT", "--out", "OUT/c.h5"), "holds no class folders"),
    (("prepare", "audit", "FILE"), "not an HDF5 file"),
    (("prepare", "audit", "CACHE"), "needs one of images"),
    (("prepare", "phantom-images", "--out", "OUT/p", "--images", "0"), "at least 1"),
]


@pytest.mark.parametrize(("arguments", "words"), CASES)
def test_bad_input(
    arguments: tuple[str, ...],
    words: str,
    phantoms: Path,
    cache: Path,
    image_cache: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    places = {
        "OUT": tmp_path / "out",
        "FILE": tmp_path / "file",
        "DATA": phantoms,
        "CACHE": cache,
        "IMAGES": image_cache,
    }
    places["OUT"].mkdir()
    places["FILE"].write_text("some text")
    named = []
    for argument in arguments:
        key, equals, value = argument.rpartition("=")
        name, slash, rest = value.partition("/")
        named.append(f"{key}{equals}{places[name]}{slash}{rest}" if name in places else argument)
    assert run_main(*named) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("error: ")
    assert error.count("\n") == 0
    assert len(error) < 400
    assert (str(places["FILE"]) if words == "FILE" else words) in error
    assert places["FILE"].read_text() == "some text"
    assert [path.name for path in places["OUT"].rglob("*") if path.is_file()] == []


def test_a_run_on_other_data_is_not_taken_for_done(
    phantoms: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("train", "brats_segresnet_demo", "--out", tmp_path / "run", "--set", "data.spacing_mm=0", "--set",
                 "data.crop=32,32,32", "--set", "train.epochs=1", "--cache")  # fmt: skip
    assert run_main(*arguments, cache) == 0
    other = write_dataset(tmp_path / "data", cases=5, seed=9, shape=(48, 56, 40), spacing_mm=4.0)
    assert run_main("prepare", "brats", "--data", other, "--out", tmp_path / "other.h5") == 0
    assert run_main(*arguments, tmp_path / "other.h5") == 2
    assert "trained on other data" in capsys.readouterr().err


def test_an_unwritable_folder(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    assert run_main(*("train", "brats_segresnet_demo", "--cache", cache, "--out", tmp_path / "run")) == 2
    assert "permissions" in capsys.readouterr().err
