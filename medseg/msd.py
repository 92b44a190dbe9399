"""Read data sets: an MSD folder (dataset.json), nnU-Net's raw form, or BraTS case folders; check what can be checked
before any work.

Legend of shapes: C channels, X Y Z the file's voxel axes.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg import nnunet
from medseg.cases import CHANNELS, SUFFIXES, CaseFiles, case_id, channel_of, refuse_twins, stay_inside, usable
from medseg.labels import KNOWN, LabelMap, from_names
from medseg.nifti import read_nifti
from medtrain.errors import UserError
from medtrain.files import parse_json
from medtrain.wording import listed, shown

# File endings of BraTS case folders (up to 2021, and from 2023), in the order of CHANNELS.
ENDINGS = {
    "FLAIR": ("_flair", "-t2f"),
    "T1w": ("_t1", "-t1n"),
    "T1Gd": ("_t1ce", "_t1gd", "-t1c"),
    "T2w": ("_t2", "-t2w"),
    "label": ("_seg", "-seg"),
}


@dataclass(frozen=True)
class Dataset:
    """A data set's cases and what its label codes mean."""

    folder: Path
    label_map: LabelMap
    cases: tuple[CaseFiles, ...]


@dataclass(frozen=True)
class Scan:
    """One scan in memory: image (C,X,Y,Z) float32 in scanner units, label (X,Y,Z) uint8 or None, affine, header."""

    image_CXYZ: np.ndarray
    label_XYZ: np.ndarray | None
    affine: np.ndarray
    header: bytes


def read_dataset(folder: Path, label_map: str = "auto") -> Dataset:
    """Find a folder's labelled cases. `label_map` "auto" reads dataset.json's words, else one of `labels.KNOWN`.

    Raises UserError for a wrong folder, a missing file, a path outside the folder, two cases of one name.
    """
    if label_map != "auto" and label_map not in KNOWN:
        raise UserError(f"label map {label_map!r} is unknown: choose auto, {', '.join(KNOWN)}.")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name the one that holds dataset.json or the BraTS case folders.")
    if (folder / "dataset.json").is_file():
        return _read_msd(folder, label_map)
    cases = find_case_folders(folder)
    if not cases:
        raise UserError(f"{folder} holds neither dataset.json nor BraTS case folders: name the data set's own folder.")
    for case in cases:
        if case.label is None:
            raise UserError(f"{case.images[0].parent} has no *_seg file: add the label or take the folder out.")
    named = label_map if label_map != "auto" else ("brats23" if "-t2f" in cases[0].images[0].name else "brats18")
    return Dataset(folder, KNOWN[named], tuple(cases))


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
        raise UserError(f"{where} is not in MSD form ({reason}): it needs training, labels and modality.") from None
    _check_channels(where, modality)
    known = from_names(names) if label_map == "auto" else KNOWN[label_map]
    if known is None:
        words = listed([f"{code} {name}" for code, name in names.items()])
        raise UserError(f"{where}: labels {words} do not tell edema, non-enhancing and enhancing: give --label-map.")
    if not entries:
        raise UserError(f"{where} lists no training case: give a data set with labelled cases.")
    cases = [_msd_case(folder, where, image, label) for image, label in entries]
    refuse_twins(cases, where)
    return Dataset(folder, known, tuple(cases))


def _read_nnunet(folder: Path, listing: dict[str, Any], label_map: str) -> Dataset:
    known = nnunet.label_map(listing) if label_map == "auto" else KNOWN[label_map]
    if known is None:
        where, words = folder / "dataset.json", shown(listing.get("labels"), 120)
        raise UserError(f"{where}: labels {words} do not tell edema, non-enhancing and enhancing: give --label-map.")
    cases = nnunet.labelled_cases(folder, listing)
    refuse_twins(cases, folder)
    return Dataset(folder, known, tuple(cases))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where a path belongs")
    return value


def _check_channels(where: Path, modality: Any) -> None:
    """The channels' number and order must be ours: FLAIR, T1w, T1Gd, T2w."""
    listed = [str(modality[key]) for key in sorted(modality, key=str)] if isinstance(modality, dict) else []
    if len(listed) != len(CHANNELS):
        raise UserError(f"{where} lists {len(listed)} channels, 4 are needed: {', '.join(CHANNELS)}.")
    for name, wanted in zip(listed, CHANNELS, strict=True):
        if channel_of(name) != wanted:
            raise UserError(
                f"{where} has channel {shown(name, 40)!r} where {wanted} belongs: order them {', '.join(CHANNELS)}."
            )


def _msd_case(folder: Path, where: Path, image: str, label: str) -> CaseFiles:
    for path in (image, label):
        target = Path(os.path.normpath(folder.absolute() / path))
        if not target.is_relative_to(os.path.normpath(folder.absolute())):
            raise UserError(f"{where} names {shown(path)}, which lies outside the data folder: correct the entry.")
        try:
            there = target.is_file()
        except OSError:  # a name too long
            there = False
        if not there:
            raise UserError(
                f"{shown(folder / path, 200)} is listed in dataset.json but is not there: restore it or drop the entry."
            )
        stay_inside(folder, target)
    return CaseFiles(case_id(folder / image), (folder / image,), folder / label)


def find_case_folders(folder: Path, aside: list[tuple[str, str]] | None = None) -> list[CaseFiles]:
    """Every BraTS case folder at or below `folder`, by its files' endings; labels may be absent.

    A folder that lacks a channel is a UserError, or goes into `aside`, as case and reason, where that is given.
    """
    by_folder: dict[Path, dict[str, Path]] = {}
    for path in sorted(folder.rglob("*.nii*")):
        if path.name.startswith(".") or not path.name.endswith(SUFFIXES):
            continue
        stem = case_id(path).lower()
        for role, endings in ENDINGS.items():
            if stem.endswith(endings):
                found = by_folder.setdefault(path.parent, {})
                if role in found:
                    raise UserError(f"{path.parent} holds two {role} files: give every case a folder of its own.")
                found[role] = path
                stay_inside(folder, path)
    cases = []
    for place, found in sorted(by_folder.items()):
        missing = [channel for channel in CHANNELS if channel not in found]
        name = usable(place.resolve().name, place)
        if missing:
            reason = f"{place} has no {missing[0]} file: add it or take the folder out."
            if aside is None:
                raise UserError(reason)
            aside.append((name, reason))
            continue
        cases.append(CaseFiles(name, tuple(found[channel] for channel in CHANNELS), found.get("label")))
    refuse_twins(cases, folder)
    return cases


def read_scan(case: CaseFiles, label_map: LabelMap) -> Scan:
    """Load one case and check it; raises UserError naming the file that is wrong."""
    loaded = [read_nifti(path) for path in case.images]
    affine = loaded[0][1]
    if len(loaded) == 1:
        data = loaded[0][0]
        if data.ndim != 4 or data.shape[3] != len(CHANNELS):
            raise UserError(f"{case.images[0]} has shape {data.shape}, not (X, Y, Z, 4): give all four channels.")
        image = np.moveaxis(data, 3, 0)
    else:
        for path, (data, found, _) in zip(case.images, loaded, strict=True):
            if data.ndim != 3:
                raise UserError(f"{path} has shape {data.shape}, not (X, Y, Z): give each channel a file of its own.")
            _same_grid(path, found, case.images[0], affine)
            if data.shape != loaded[0][0].shape:
                raise UserError(
                    f"{path} has shape {data.shape}, not that of {case.images[0].name}: register the channels."
                )
        image = np.stack([data for data, _, _ in loaded])
    if not np.isfinite(image).all():
        raise UserError(f"{case.images[0]} holds NaN or infinite voxels: export it again or take the case out.")
    if not image.any(axis=(1, 2, 3)).all():
        raise UserError(f"{case.images[0]} is zero everywhere in a channel: export it again or take the case out.")
    label = None if case.label is None else _read_label(case, image.shape[1:], affine, label_map)
    return Scan(np.ascontiguousarray(image), label, affine, loaded[0][2])


def _read_label(case: CaseFiles, shape: tuple[int, ...], affine: np.ndarray, label_map: LabelMap) -> np.ndarray:
    assert case.label is not None
    data, found, _ = read_nifti(case.label)
    if data.shape != shape:
        raise UserError(f"{case.label} has shape {data.shape}, its image {shape}: they must be on one grid.")
    _same_grid(case.label, found, case.images[0], affine)
    codes = {0, label_map.edema, label_map.core, label_map.enhancing}
    odd = data[~np.isin(data, list(codes))]
    if odd.size:
        raise UserError(
            f"{case.label} holds the label code {odd.min():g}, label map {label_map.name} knows {sorted(codes)}: "
            "give the right --label-map."
        )
    return data.astype(np.uint8)


def _same_grid(path: Path, affine: np.ndarray, first: Path, first_affine: np.ndarray) -> None:
    """A label stored left-right mirrored beside its image would else be learnt without a word."""
    if not np.allclose(affine, first_affine, atol=1e-2):
        raise UserError(f"{path} lies on another grid than {first.name} (their affines differ): resample it.")
