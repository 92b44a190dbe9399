"""nnU-Net's raw data sets (version 2): a file a channel, whose order and labels dataset.json tells.

The form is described in nnU-Net's documentation, dataset_format.md: `imagesTr/CASE_0000.nii.gz` is the first channel of
a case, `labelsTr/CASE.nii.gz` its label; labels are codes, or for training by regions lists of codes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg.cases import CHANNELS, SUFFIXES, CaseFiles, case_id, channel_of
from medseg.labels import LabelMap, from_codes, from_names
from medtrain.aside import Aside
from medtrain.errors import UserError
from medtrain.files import parse_json
from medtrain.paths import spelt, stay_inside
from medtrain.wording import shown

LISTING = "dataset.json"


def is_raw(listing: Any) -> bool:
    """Whether a dataset.json is nnU-Net's rather than the Decathlon's."""
    return isinstance(listing, dict) and "file_ending" in listing and "training" not in listing


def label_map(listing: Mapping[str, Any]) -> LabelMap | None:
    """What the codes mean: by names, or by three regions of which each holds the next; None where neither tells."""
    labels = listing.get("labels")
    if not isinstance(labels, dict):
        return None
    if all(isinstance(code, int) for code in labels.values()):
        return from_names({str(name): str(code) for name, code in labels.items()})
    listed = [code if isinstance(code, list) else [code] for code in labels.values() if code != 0]
    if not all(isinstance(code, int) for codes in listed for code in codes):
        return None
    enhancing, core, whole = sorted((set(codes) for codes in listed), key=len) if len(listed) == 3 else [set[int]()] * 3
    if [len(enhancing), len(core), len(whole)] != [1, 2, 3] or not enhancing < core < whole:
        return None
    return from_codes(edema=(whole - core).pop(), core=(core - enhancing).pop(), enhancing=enhancing.pop())


def labelled_cases(folder: Path, listing: Mapping[str, Any]) -> list[CaseFiles]:
    """Every case of labelsTr; raises UserError where a file is missing or lies elsewhere, or an image has no label."""
    for name in ("labelsTr", "imagesTr"):
        stay_inside(folder, folder / name)
    ending, numbers = _ending(folder, listing), _order(folder / LISTING, listing)
    labels = {case_id(path): path for path in sorted((folder / "labelsTr").glob(f"*{ending}")) if path.name[0] != "."}
    if not labels:
        raise UserError(f"{spelt(folder / 'labelsTr')} holds no {ending} file: give a data set with labelled cases.")
    cases = [CaseFiles(name, _channels(folder / "imagesTr", name, numbers, ending), path)
             for name, path in labels.items()]  # fmt: skip
    for case in cases:
        for path in (*case.images, labels[case.id]):
            if not path.is_file():
                raise UserError(
                    f"{spelt(path)} is not there: restore it, or take the case out of labelsTr and imagesTr."
                )
            stay_inside(folder, path)
    for name in _names(folder / "imagesTr", ending):
        if name not in labels:
            raise UserError(
                f"{spelt(folder / 'imagesTr' / name)}_0000{ending} has no label in labelsTr: add it or take it out."
            )
    return cases


def scans(folder: Path, place: Path) -> tuple[list[CaseFiles], list[Aside]]:
    """The scans of a folder such as imagesTs, if it or the one above has nnU-Net's dataset.json, else none; then those
    that lack a channel, with the reason. Raises UserError where a link leads out of `place`, which the user named.
    """
    for root in (folder, folder.parent):
        listing = _listing(root / LISTING)
        if listing is not None:
            break
    else:
        return [], []
    ending, numbers = _ending(root, listing), _order(root / LISTING, listing)
    cases: list[CaseFiles] = []
    lacking: list[Aside] = []
    for name in _names(folder, ending):
        images = _channels(folder, name, numbers, ending)
        missing = [path for path in images if not path.is_file()]
        if missing:
            lacking.append((name, f"{spelt(missing[0])} is not there: add it or take the scan out."))
            continue
        for path in images:
            stay_inside(place, path)
        cases.append(CaseFiles(name, images, None))
    return cases, lacking


def _listing(path: Path) -> dict[str, Any] | None:
    """nnU-Net's dataset.json; None where there is none, or another."""
    try:
        listing = parse_json(path)
    except ValueError:
        return None
    return listing if is_raw(listing) else None


def _ending(folder: Path, listing: Mapping[str, Any]) -> str:
    ending = listing["file_ending"]
    if ending not in SUFFIXES:
        raise UserError(
            f"{spelt(folder / LISTING)} has file_ending {shown(ending, 40)!r}: convert the files to .nii.gz."
        )
    return str(ending)


def _order(where: Path, listing: Mapping[str, Any]) -> list[int]:
    """The number of the file of each of CHANNELS."""
    names = listing.get("channel_names")
    named = {channel_of(str(name)): number for number, name in names.items()} if isinstance(names, dict) else {}
    missing = [channel for channel in CHANNELS if not str(named.get(channel, "")).isdecimal()]
    if missing:
        raise UserError(
            f"{spelt(where)} has no channel {missing[0]} among its channel_names: {', '.join(CHANNELS)} are needed."
        )
    return [int(named[channel]) for channel in CHANNELS]


def _channels(folder: Path, name: str, numbers: list[int], ending: str) -> tuple[Path, ...]:
    return tuple(folder / f"{name}_{number:04d}{ending}" for number in numbers)


def _names(folder: Path, ending: str) -> list[str]:
    """The cases of a folder of images, by their files."""
    found = (re.fullmatch(r"(.+)_\d{4}", case_id(path)) for path in sorted(folder.glob(f"*{ending}"))
             if path.name[0] != ".")  # fmt: skip
    return list(dict.fromkeys(match[1] for match in found if match))
