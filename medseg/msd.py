"""Read data sets: an MSD folder (dataset.json), nnU-Net's raw form, or BraTS case folders; check what can be checked
before any work.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg import nnunet
from medseg.brats import find_case_folders
from medseg.cases import CHANNELS, CaseFiles, case_id, channel_of, refuse_twins
from medseg.labels import KNOWN, LabelMap, from_names
from medtrain.errors import UserError
from medtrain.files import parse_json
from medtrain.paths import spelt, stay_inside
from medtrain.wording import listed, shown


@dataclass(frozen=True)
class Dataset:
    """A data set's cases and what its label codes mean."""

    folder: Path
    label_map: LabelMap
    cases: tuple[CaseFiles, ...]


def read_dataset(folder: Path, label_map: str = "auto") -> Dataset:
    """Find a folder's labelled cases. `label_map` "auto" reads dataset.json's words, else one of `labels.KNOWN`.

    Raises UserError for a wrong folder, a missing file, a path outside the folder, two cases of one name.
    """
    if label_map != "auto" and label_map not in KNOWN:
        raise UserError(f"label map {label_map!r} is unknown: choose auto, {', '.join(KNOWN)}.")
    if not folder.is_dir():
        raise UserError(
            f"{spelt(folder)} is not a folder: name the one that holds dataset.json or the BraTS case folders."
        )
    if (folder / "dataset.json").is_file():
        return _read_msd(folder, label_map)
    cases, lacking = find_case_folders(folder)
    if lacking:
        more = f" (and {len(lacking) - 1} more lack a file)" if len(lacking) > 1 else ""
        raise UserError(f"{lacking[0][1].removesuffix('.')}{more}.")
    if not cases:
        raise UserError(f"{spelt(folder)} holds neither dataset.json nor BraTS case folders (*_flair, *_t1, *_t1ce, "
                        "*_t2 and *_seg): name the data set's own folder.")  # fmt: skip
    if bare := [case for case in cases if case.label is None]:
        more = f" (and {len(bare) - 1} more have none)" if len(bare) > 1 else ""
        raise UserError(
            f"{spelt(bare[0].images[0].parent)} has no *_seg file: add the label or take the folder out{more}."
        )
    return Dataset(folder, KNOWN[label_map if label_map != "auto" else _coding_of(cases)], tuple(cases))


def _coding_of(cases: Sequence[CaseFiles]) -> str:
    """How BraTS codes labels, by the names of its files; raises UserError where they do not tell, or tell two."""
    codings = {case.images[0].name: "brats23" if "-t2f" in case.images[0].name else "brats18" for case in cases}
    if len(set(codings.values())) > 1:
        raise UserError(f"{spelt(cases[0].images[0].parent.parent)} holds BraTS cases of several years, whose labels "
                        "are coded in two ways: prepare them apart.")  # fmt: skip
    for case in cases:
        if "-PED-" in case.id.upper():
            raise UserError(f"{spelt(case.images[0].parent)}: BraTS codes children's tumours by year: give --label-map "
                            "brats23 (2023: 3 is enhancing) or brats24ped (2024: 1 is).")  # fmt: skip
    return next(iter(codings.values()))


def _read_msd(folder: Path, label_map: str) -> Dataset:
    where = folder / "dataset.json"
    try:
        listing = parse_json(where)
        if nnunet.is_raw(listing):
            return _read_nnunet(folder, listing, label_map)
        entries = [(_text(entry["image"]), _text(entry["label"])) for entry in listing["training"]]
        modality = listing.get("modality") or listing["channel_names"]
        names = {str(code): str(words) for code, words in listing["labels"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {shown(error, 60)}"
        raise UserError(
            f"{spelt(where)} is not in MSD form ({reason}): it needs training, labels and modality."
        ) from None
    _check_channels(where, modality)
    known = from_names(names) if label_map == "auto" else KNOWN[label_map]
    if known is None:
        words = listed([f"{code} {name}" for code, name in names.items()])
        raise UserError(f"{spelt(where)}: labels {words} do not tell edema, non-enhancing and enhancing: give "
                        "--label-map.")  # fmt: skip
    if not entries:
        raise UserError(f"{spelt(where)} lists no training case: give a data set with labelled cases.")
    cases = _msd_cases(folder, where, entries)
    refuse_twins(cases, where)
    return Dataset(folder, known, tuple(cases))


def _read_nnunet(folder: Path, listing: dict[str, Any], label_map: str) -> Dataset:
    known = nnunet.label_map(listing) if label_map == "auto" else KNOWN[label_map]
    if known is None:
        where, words = folder / "dataset.json", shown(listing.get("labels"), 120)
        raise UserError(f"{spelt(where)}: labels {words} do not tell edema, non-enhancing and enhancing: give "
                        "--label-map.")  # fmt: skip
    cases = nnunet.labelled_cases(folder, listing)
    refuse_twins(cases, folder)
    return Dataset(folder, known, tuple(cases))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where a path belongs")
    return value.replace("\\", "/")  # as Windows writes paths


def _check_channels(where: Path, modality: Any) -> None:
    """The channels' number and order must be ours: FLAIR, T1w, T1Gd, T2w."""
    listed = [str(name) for name in modality] if isinstance(modality, list) else []
    if isinstance(modality, dict):
        listed = [str(modality[key]) for key in sorted(modality, key=str)]
    if len(listed) != len(CHANNELS):
        raise UserError(f"{spelt(where)} lists {len(listed)} channels, 4 are needed: {', '.join(CHANNELS)}.")
    for name, wanted in zip(listed, CHANNELS, strict=True):
        if channel_of(name) != wanted:
            raise UserError(f"{spelt(where)} has channel {shown(name, 40)!r} where {wanted} belongs: order them "
                            f"{', '.join(CHANNELS)}.")  # fmt: skip


def _msd_cases(folder: Path, where: Path, entries: Sequence[tuple[str, str]]) -> list[CaseFiles]:
    """The listed cases; raises UserError where a path leaves the folder, or files are missing."""
    root, absent = os.path.normpath(folder.absolute()), []
    for path in (path for entry in entries for path in entry):
        # as it is written: after a link to a folder, ".." leads beside what the link points to
        target = folder / path
        if not Path(os.path.normpath(target.absolute())).is_relative_to(root):
            raise UserError(
                f"{spelt(where)} names {shown(path)}, which lies outside the data folder: correct the entry."
            )
        try:
            there = target.is_file()
        except OSError:  # a name too long
            there = False
        if there:
            stay_inside(folder, target)
        else:
            absent.append(path)
    if absent:
        more = f" (and {len(absent) - 1} more are missing)" if len(absent) > 1 else ""
        first = shown(folder / absent[0], 200)
        raise UserError(f"{first} is listed in dataset.json but is not there{more}: restore it or drop the entry.")
    return [CaseFiles(case_id(folder / image), (folder / image,), folder / label) for image, label in entries]
