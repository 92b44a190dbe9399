"""Class probabilities of image files, from one or several trained members."""

import mimetypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from medcls import backbones, images
from medcls.augment import WholeImages
from medcls.folders import is_litter
from medcls.pipeline import ImageLoader
from medcls.recipes import ClsRecipe
from medcls.task import class_probs
from medtrain.ensemble import weighted_mean
from medtrain.errors import UserError
from medtrain.files import write_text
from medtrain.paths import is_formula, spelt, walk_files
from medtrain.progress import Progress
from medtrain.strategy import Forward
from medtrain.tables import to_csv
from medtrain.trained import default_device, read_best, restored
from medtrain.wording import shown

CHUNK = 128  # images in memory at once
IMAGES = ("image/", "application/dicom", ".dcm", ".svs", ".ndpi")  # what a file is by its name


@dataclass
class Member:
    """A run's best weights, ready to predict."""

    recipe: ClsRecipe
    classes: list[str]
    forward: Forward
    device: torch.device

    @classmethod
    def load(cls, run: Path, device: torch.device) -> Self:
        """Read a run folder's checkpoint_best.pt; raises UserError."""
        path, content = read_best(run, classes=list)
        if not 2 <= len(content["classes"]) <= 10000 or not all(isinstance(name, str) for name in content["classes"]):
            raise UserError(f"{path} does not tell its classes: name another multicancer run.")
        recipe = ClsRecipe.from_json(content["recipe"], str(path))
        if content["preparation"].get("version") != images.VERSION:
            raise UserError(f"{path} is of images prepared by another version of this program: train it again.")
        classes = list(content["classes"])
        forward = restored(path, content, recipe, lambda: backbones.build_model(recipe, len(classes)), device)
        return cls(recipe, classes, forward, device)

    def probs(self, encoded: Sequence[bytes], sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        """Class probabilities (N,K) float64 of encoded images, prepared as in training."""
        recipe, (mean, std) = self.recipe, backbones.normalisation(self.recipe.model.name)
        source = WholeImages(len(encoded), lambda n: (np.frombuffer(encoded[n], np.uint8), sizes[n]),
                             lambda n: f"image {n + 1}")  # fmt: skip
        loader = ImageLoader(source, batch=min(recipe.evaluate.batch, len(encoded)),
                             size=recipe.data.size, operations=(), mean=mean, std=std, workers=0,
                             threads=min(4, len(os.sched_getaffinity(0))), device=self.device)  # fmt: skip
        return np.stack(list(class_probs(self.forward, loader, len(encoded), flips=recipe.evaluate.flips)))


def predict(runs: Sequence[Path], weights: Sequence[float], place: Path, out: Path) -> tuple[str, int]:
    """Write one line an image: path, most likely class, a probability a class, and why there is none; returns a
    sentence about it, and how many files that bear an image's name could not be read. Raises UserError.
    """
    if out.suffix.lower() != ".csv":
        raise UserError(f"{out} must end in .csv: class probabilities are written as one table.")
    device = default_device()
    members = [Member.load(run, device) for run in runs]
    for run, member in zip(runs, members, strict=True):
        if member.classes != members[0].classes:
            raise UserError(f"{run} knows other classes than {runs[0]}: members of one ensemble must share them.")
    files = [path for path in _files(place) if path.resolve() != out.resolve()]
    if not files:
        raise UserError(f"{spelt(place)} holds no file: give an image or a folder of images.")
    odd = next((path for path in files if is_formula(_name(path, place))), None)
    if odd is not None:
        raise UserError(f"{spelt(odd)}: spreadsheets take {shown(_name(odd, place), 60)!r} for a formula: rename it.")
    lines = [["image", "prediction", *(f"p:{name}" for name in members[0].classes), "note"]]
    with Progress(len(files), "predict") as progress:
        for start in range(0, len(files), CHUNK):
            chunk = files[start : start + CHUNK]
            lines += _lines(chunk, place, members, weights)
            progress.advance(count=len(chunk))
    if all(line[-1] for line in lines[1:]):
        raise UserError(f"{spelt(files[0])} can not be read ({lines[1][-1]}), nor any other file there: give images.")
    write_text(out, to_csv(lines))
    noted = [path for path, line in zip(files, lines[1:], strict=True) if line[-1]]
    lost = sum((mimetypes.guess_type(path.name)[0] or path.suffix.lower()).startswith(IMAGES) for path in noted)
    return f"{len(files)} files in {out}" + (f", {len(noted)} of them could not be read" if noted else ""), lost


def _name(path: Path, place: Path) -> str:
    """What the table calls a file."""
    return path.relative_to(place).as_posix() if place.is_dir() else path.name


def _files(place: Path) -> Iterator[Path]:
    """The file, or those of the folder, that the user named, wherever links there lead."""
    if place.is_file():
        yield place
        return
    yield from sorted(path for path in walk_files(place, is_litter, anywhere=True) if path.is_file())


def _lines(chunk: Sequence[Path], place: Path, members: Sequence[Member], weights: Sequence[float]) -> list[list[str]]:
    encoded: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    notes: dict[Path, str] = {}
    for path in chunk:
        try:
            image, content, _ = images.usable(images.read_file(path))
        except (images.BadImage, OSError) as error:
            notes[path] = getattr(error, "strerror", None) or str(error)
            continue
        encoded.append(content)
        sizes.append((image.height, image.width))
    classes = members[0].classes
    mean = weighted_mean((m.probs(encoded, sizes) for m in members), weights) if encoded else np.zeros((0, 0))
    rows = iter(mean)
    lines = []
    for path in chunk:
        name = shown(_name(path, place), 4096)
        if path in notes:
            lines.append([name, "", *[""] * len(classes), notes[path]])
            continue
        probs = next(rows)
        lines.append([name, classes[int(probs.argmax())], *(f"{p:.6f}" for p in probs), ""])
    return lines
