"""Finds the images: the Multi Cancer layout, the same nested once more, or any folder of class folders."""

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from medcls.recipes import ALL_CANCERS
from medtrain.errors import UserError
from medtrain.paths import is_formula, spelt, stay_inside
from medtrain.patients import NAME as PATIENTS
from medtrain.wording import listed, plain, shown

# The published layout (Kaggle "Multi Cancer"), in its own order.
PUBLISHED: dict[str, tuple[str, ...]] = {
    "ALL": ("all_benign", "all_early", "all_pre", "all_pro"),
    "Brain Cancer": ("brain_glioma", "brain_menin", "brain_tumor"),
    "Breast Cancer": ("breast_benign", "breast_malignant"),
    "Cervical Cancer": ("cervix_dyk", "cervix_koc", "cervix_mep", "cervix_pab", "cervix_sfi"),
    "Kidney Cancer": ("kidney_normal", "kidney_tumor"),
    "Lung and Colon Cancer": ("colon_aca", "colon_bnt", "lung_aca", "lung_bnt", "lung_scc"),
    "Lymphoma": ("lymph_cll", "lymph_fl", "lymph_mcl"),
    "Oral Cancer": ("oral_normal", "oral_scc"),
}
# What unpacking and file managers leave behind; never an image.
LITTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "icon\r", "@eadir", "$recycle.bin", "#recycle",
          "lost+found", "system volume information"}  # fmt: skip
# Folders that sort images otherwise than by cancer or class.
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}
MASKS = {"image", "images", "img", "mask", "masks", "label", "labels", "annotations"}


@dataclass(frozen=True)
class ImageFolder:
    """A data set: its root, the classes as (cancer, class), and the files with the class of each, sorted by path."""

    root: Path
    classes: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, int], ...]
    notes: tuple[str, ...]

    def class_files(self, number: int) -> list[str]:
        """The files of a class."""
        return [path for path, owner in self.files if owner == number]

    def in_words(self) -> str:
        """The cancers and the classes of each, as they were found."""
        cancers: dict[str, list[str]] = {}
        for cancer, name in self.classes:
            cancers.setdefault(cancer, []).append(shown(name, 40))
        told = [f"{shown(cancer, 40)} ({listed(names, 8)})" for cancer, names in cancers.items()]
        return "; ".join(told[:12]) + ("; …" if len(told) > 12 else "")


def read_folders(place: Path) -> ImageFolder:
    """List a data set; file names are relative to its root, with '/' on every system.

    Notes tell what differs from the published layout. Raises UserError for anything that is no folder of class
    folders, an empty class, a cancer of one class, a link out of `place`, or a name that no table can hold.
    """
    if not place.is_dir():
        raise UserError(f"{spelt(place)} is not a folder: give the Multi Cancer folder, or a folder of class folders.")
    if (place / "dataset.json").is_file() and (place / "imagesTr").is_dir():
        raise UserError(
            f"{spelt(place)} is a data set of scans (it has a dataset.json): give it to a sweep or recipe of brats."
        )
    root = place
    while True:
        inner = _folders(root, place)
        if not inner:
            raise UserError(
                f"{spelt(place)} holds no class folders: give the Multi Cancer folder, or a folder of them."
            )
        deeper = [folder for folder in inner if _folders(folder, place)]
        if not deeper:
            return _listed(root, {_usable(root.resolve().name, root): inner})
        if all(not _folders(leaf, place) for folder in inner for leaf in _folders(folder, place)):
            break
        if len(inner) > 1:
            raise UserError(f"{spelt(deeper[0])} is nested too deep: give a folder whose folders hold class folders.")
        root = inner[0]
    shallow = sorted(folder.name for folder in inner if folder not in deeper)
    if shallow:
        odd = spelt(root / shallow[0])
        raise UserError(f"{odd} has no class folders, its neighbours have: move it, or sort its images.")
    cancers = {folder.name: _folders(folder, place) for folder in inner}
    return _listed(root, cancers)


def _refuse_other_orders(root: Path, names: Sequence[str]) -> None:
    """UserError where folders that should be cancers or classes are parts of a split, or images beside their masks."""
    told, known = " and ".join(names), {name.lower() for name in names}
    if known <= PARTS:
        raise UserError(f"{spelt(root)} is sorted into {told}, which are no classes: put all images of a class into "
                        "one folder (splits are made here, without copies on both sides).")  # fmt: skip
    if known <= MASKS:
        raise UserError(
            f"{spelt(root)} holds {told}, which are no classes: leave the masks out, and move the images up."
        )


def is_litter(name: str) -> bool:
    """Whether a name is hidden or left behind by a file manager."""
    return name.startswith(".") or name.lower() in LITTER


def _folders(folder: Path, place: Path) -> list[Path]:
    """The folders in one; UserError where a link leads out of `place`, which the user named."""
    with os.scandir(folder) as entries:
        names = [_usable(e.name, folder) for e in entries if _is_folder(e) and not is_litter(e.name)]
    found = [folder / name for name in sorted(names)]
    for path in found:
        stay_inside(place, path)
    return found


def _listed(root: Path, cancers: dict[str, list[Path]]) -> ImageFolder:
    classes: list[tuple[str, str]] = []
    files: list[tuple[str, int]] = []
    notes: list[str] = []
    strays = [path for place in {root, *(folders[0].parent for folders in cancers.values())} for path in _images(place)]
    strays = [path for path in strays if path.name.lower() != PATIENTS]
    if strays:
        notes.append(f"{len(strays)} files lie beside the class folders and are left out, such as {min(strays).name}.")
    if len(cancers) > 1:
        _refuse_other_orders(root, list(cancers))
    for cancer, folders in cancers.items():
        _refuse_other_orders(folders[0].parent, [folder.name for folder in folders])
        if len(folders) < 2:
            raise UserError(
                f"{spelt(root)}: {cancer} has one class only ({folders[0].name}): there is nothing to tell apart."
            )
        published = PUBLISHED.get(cancer, ())
        names = {folder.name: folder for folder in folders}
        odd = [name for name in names if published and name not in published]
        missing = [name for name in published if name not in names]
        for words, which in (("unknown to the published set", odd), ("missing", missing)):
            if which:
                notes.append(f"{cancer}: classes {words}: {', '.join(which)}.")
        for name in [*(n for n in published if n in names), *(n for n in sorted(names) if n not in published)]:
            found = sorted(_images(names[name]))
            if not found:
                raise UserError(f"{spelt(names[name])} is empty: add its images or remove the folder.")
            files += [(path.relative_to(root).as_posix(), len(classes)) for path in found]
            classes.append((cancer, name))
    return ImageFolder(root, tuple(classes), tuple(sorted(files)), tuple(notes))


def _images(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            # a broken link is no file; it is listed, and set aside with its name when it can not be read
            if not _is_folder(entry) and not is_litter(entry.name):
                yield folder / _usable(entry.name, folder)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _usable(name: str, folder: Path) -> str:
    """A name of a class or file, which stands in tables; UserError for what can not."""
    if not plain(name):
        words = f"holds a name that is not UTF-8 or has a line break ({shown(name, 60)})"
        raise UserError(f"{spelt(folder)} {words}: rename it.")
    if is_formula(name):
        words = f"holds a name that spreadsheets take for a formula ({shown(name, 60)})"
        raise UserError(f"{spelt(folder)} {words}: rename it.")
    return name


class HasCancers(Protocol):
    """A cache of images, or what is known of a folder."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    @property
    def cancers(self) -> list[str]:
        """What it holds, in the order of the classes."""


@dataclass(frozen=True)
class Cancers:
    """The cancers of a data folder."""

    path: Path
    cancers: list[str]


def choose_cancer(source: HasCancers, cancer: str) -> str:
    """The cancer that a recipe means, "every" included; raises UserError with the near ones."""
    known = source.cancers
    if cancer == ALL_CANCERS or cancer in known:
        return cancer
    if not cancer and len(known) == 1:
        return known[0]
    if not cancer:
        raise UserError(
            f'{source.path} holds {", ".join(known)}: choose with --set data.cancer="{known[0]}", or every.'
        )
    near = difflib.get_close_matches(cancer, known, 2, 0.4) or known
    raise UserError(f"{source.path} has no cancer {cancer!r}: choose {', '.join(near)}, or every.")
