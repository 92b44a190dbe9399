"""Damaged and hostile checkpoints given to predict: one sentence that names the file, exit code 2, no code run."""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from hostile import nested
from launch_helpers import check_refused, run_main

from medtrain import checkpoint

Change = Callable[[Path], object]
NAN = float("nan")


def resaved(change: Callable[[dict], object]) -> Change:
    """Another content of the best checkpoint."""

    def apply(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        other = change(content)
        torch.save(content if other is None else other, path)

    return apply


def weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Other weights of the first layer."""

    def apply(content: dict) -> None:
        name = next(iter(content["model"]))
        content["model"][name] = change(content["model"][name])

    return resaved(apply)


class Payload:
    """What runs a program when it is unpickled carelessly."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/medtrain-was-here",)


def packed(path: Path) -> None:
    """The same archive, its records packed, and one more that unpacks to a gigabyte."""
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
        with new.open(f"{old.namelist()[0].split('/')[0]}/data/999", "w", force_zip64=True) as file:
            for _ in range(64):
                file.write(bytes(1 << 20))


def recipe(**fields: Any) -> Change:
    """Other fields in the recipe that a checkpoint carries; a double underscore for a dot."""

    def apply(content: dict) -> None:
        value = json.loads(content["recipe"])
        for name, given in fields.items():
            *sections, last = name.split("__")
            place = value
            for section in sections:
                place = place[section]
            place[last] = given
        content["recipe"] = json.dumps(value)

    return resaved(apply)


CHECKPOINTS: dict[str, tuple[Change, str]] = {
    "absent": (lambda p: p.unlink(), "is not there"),
    "empty": (lambda p: p.write_bytes(b""), "damaged"),
    "half": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "damaged"),
    "a text": (lambda p: p.write_text("weights"), "damaged"),
    "an empty archive": (lambda p: zipfile.ZipFile(p, "w").close(), "damaged"),
    "an archive of something else": (lambda p: _archive(p, {"a/b.txt": b"x"}), "damaged"),
    "an archive that leaves": (lambda p: _archive(p, {"../../x": b"x"}), "damaged"),
    "a flipped byte": (lambda p: _flip(p), "damaged"),
    "packed": (packed, "damaged"),
    "code in it": (lambda p: torch.save({"model": Payload()}, p), "damaged|no checkpoint"),
    "a pickle of code": (lambda p: p.write_bytes(pickle.dumps(Payload())), "damaged"),
    "a list": (resaved(lambda c: [1, 2]), "no checkpoint"),
    "a tensor": (resaved(lambda c: torch.zeros(3)), "no checkpoint"),
    "nothing but weights": (resaved(lambda c: {"model": c["model"]}), "another task or version"),
    "no weights": (resaved(lambda c: {**c, "model": {}}), "does not fit"),
    "weights a list": (resaved(lambda c: {**c, "model": [1]}), "another task or version"),
    "weights of texts": (resaved(lambda c: {**c, "model": {"a": "b"}}), "no tensors by name"),
    "weights NaN": (weights(lambda t: t * NAN), "no numbers"),
    "weights of another shape": (weights(lambda t: t[:1]), "does not fit"),
    "weights sparse": (weights(lambda t: t.to_sparse()), "no tensors by name|damaged"),
    "weights of one number": (weights(lambda t: t.flatten()[0].clone().expand(t.shape)), "larger than its bytes"),
    "weights that overlap": (
        weights(lambda t: t.flatten()[: t.numel() - 1].clone().as_strided(t.shape, (0, *t.stride()[1:]))),
        "larger than its bytes",
    ),
    "weights without bytes": (weights(lambda t: t.to("meta")), "larger than its bytes"),
    "recipe a number": (resaved(lambda c: {**c, "recipe": 3}), "another task or version"),
    "recipe not JSON": (resaved(lambda c: {**c, "recipe": "{"}), "not JSON"),
    "recipe nested": (resaved(lambda c: {**c, "recipe": nested(99999)}), "not JSON"),
    "recipe of another name": (recipe(name="../../etc"), "no recipe's name"),
    "recipe of another task": (recipe(task="other"), "field task"),
    "recipe with a negative batch": (recipe(evaluate__batch=-1), "at least 1"),
    "recipe with a huge batch": (recipe(evaluate__batch=10**30), "at most"),
    "recipe with another field": (recipe(data__colour=1), "colour"),
    "preparation missing": (resaved(lambda c: {k: v for k, v in c.items() if k != "preparation"}), "another task"),
    "preparation of another version": (resaved(lambda c: c["preparation"].update(version=99)), "another version"),
}
SCANS: dict[str, tuple[Change, str]] = {
    "labels missing": (resaved(lambda c: {k: v for k, v in c.items() if k != "label_map"}), "another task"),
    "labels of one code": (resaved(lambda c: c["label_map"].update(edema=3)), "labels mean"),
    "labels of texts": (resaved(lambda c: c["label_map"].update(edema="x")), "labels mean"),
    "labels above 255": (resaved(lambda c: c["label_map"].update(edema=300)), "labels mean"),
    "spacing NaN": (resaved(lambda c: c["preparation"].update(spacing_mm=NAN)), "spacing_mm"),
    "spacing of atoms": (resaved(lambda c: c["preparation"].update(spacing_mm=1e-7)), "spacing_mm"),
    "voxels NaN": (resaved(lambda c: c["preparation"].update(voxel_mm=[1.0, NAN, 1.0])), "voxel_mm"),
    "voxels of no size": (resaved(lambda c: c["preparation"].update(voxel_mm=[1.0, 0.0, 1.0])), "voxel_mm"),
    "voxels of two axes": (resaved(lambda c: c["preparation"].update(voxel_mm=[1.0, 1.0])), "voxel_mm"),
    "crop of kilometres": (recipe(data__crop=[10**6] * 3), "at most"),
    "window below 0": (recipe(evaluate__window=[-8, 0, 0]), "at least 0"),
    "overlap 1": (recipe(evaluate__overlap=1.0), "below 1"),
    "a million filters": (recipe(model__filters=10**6), "at most"),
    "no blocks": (recipe(model__blocks_down=[]), "blocks"),
    "flips about the ninth axis": (recipe(evaluate__flip_axes=[9]), "at most"),
    "of the other task": (lambda p: shutil.copy(_other(p, "multicancer"), p), "fields|another task"),
}  # fmt: skip
PICTURES: dict[str, tuple[Change, str]] = {
    "classes missing": (resaved(lambda c: {k: v for k, v in c.items() if k != "classes"}), "another task"),
    "one class": (resaved(lambda c: {**c, "classes": c["classes"][:1]}), "classes"),
    "more classes": (resaved(lambda c: {**c, "classes": [*c["classes"], "more"]}), "does not fit"),
    "classes of numbers": (resaved(lambda c: {**c, "classes": [1, 2]}), "classes"),
    "images of a kilometre": (recipe(data__size=10**6), "at most"),
    "a wide network": (recipe(model__mlp_ratio=1e9), "at most"),
    "another network": (recipe(model__name="vgg19"), "does not fit"),
    "no network": (recipe(model__name="alexnet"), "needs one of"),
    "of the other task": (lambda p: shutil.copy(_other(p, "brats"), p), "fields|another task"),
}
OTHER: dict[str, Path] = {}


def _other(path: Path, task: str) -> Path:
    return OTHER[task] / "member" / checkpoint.BEST


def _archive(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _predicts(task: str, change: Change, words: str, sweep: Path, source: Path, tmp_path: Path, capfd: Any) -> None:
    path, out = sweep / "member" / checkpoint.BEST, tmp_path / "out"
    change(path)
    image = next(source.rglob("*.nii.gz" if task == "brats" else "*.jpg"))
    target = out if task == "brats" else out / "p.csv"
    code = run_main("predict", "--members", sweep / "member", "--image", image, "--out", target)
    check_refused(code, capfd.readouterr().err, str(path), words, out)
    assert not Path("/tmp/medtrain-was-here").exists()


@pytest.mark.parametrize("name", [*CHECKPOINTS, *SCANS])
def test_checkpoints_of_scans(
    name: str, copy: Callable[[str], Path], sweeps: dict[str, Path], phantoms: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    OTHER.update(sweeps)
    _predicts("brats", *(CHECKPOINTS | SCANS)[name], copy("brats"), phantoms, tmp_path, capfd)


@pytest.mark.parametrize("name", PICTURES)
def test_checkpoints_of_images(
    name: str, copy: Callable[[str], Path], sweeps: dict[str, Path], pictures: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    OTHER.update(sweeps)
    _predicts("multicancer", *PICTURES[name], copy("multicancer"), pictures, tmp_path, capfd)


RESUMED = ("empty", "half", "a text", "an empty archive", "a flipped byte", "code in it", "a pickle of code", "a list")


@pytest.mark.parametrize("name", RESUMED)
def test_checkpoints_that_a_run_goes_on_from(
    name: str, copy: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = copy("brats") / "member"
    change, words = CHECKPOINTS[name]
    (run / checkpoint.PREVIOUS).unlink(missing_ok=True)
    (run / "done.json").unlink()
    change(run / checkpoint.LAST)
    sets = [part for item in TINY for part in ("--set", item)]
    code = run_main("train", "brats_segresnet_demo", "--cache", run.parent / "cache.h5", "--out", run, *sets)
    check_refused(code, capfd.readouterr().err, str(run / checkpoint.LAST), words, tmp_path / "none")
    assert not (run / "done.json").exists()
    assert not Path("/tmp/medtrain-was-here").exists()
