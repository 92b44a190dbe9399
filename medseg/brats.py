"""BraTS case folders, and folders like them: four files of a case and its label, known by how their names end."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from medseg.cases import CHANNELS, SUFFIXES, CaseFiles, case_id, refuse_twins, usable
from medtrain.aside import Aside
from medtrain.errors import UserError
from medtrain.paths import spelt, stay_inside, walk_files
from medtrain.wording import shown

LABEL = "label"
# How names end, after _ or - or as the whole name: BraTS up to 2021 and from 2023, BIDS, UCSF-PDGM.
ENDINGS = {
    "FLAIR": ("flair", "t2f", "t2flair", "t2_flair", "t2-flair"),
    "T1w": ("t1", "t1n", "t1w"),
    "T1Gd": ("t1ce", "t1gd", "t1c", "ce-gad_t1w"),
    "T2w": ("t2", "t2w"),
    LABEL: ("seg", "segm", "dseg", "tumor_segmentation"),
}
Files = dict[str, Path]  # by channel, or LABEL


def find_case_folders(folder: Path) -> tuple[list[CaseFiles], list[Aside]]:
    """Every case at or below `folder`, by its files' endings: those of one folder whose names begin alike are one case.
    Labels may be absent. Then those that lack a channel, with the reason. Raises UserError where a link leads out of
    `folder`, or two files have one part in a case.
    """
    groups: dict[tuple[Path, str], Files] = {}
    for path in walk_files(folder, lambda name: name.startswith(".")):
        told = role_of(case_id(path)) if path.name.endswith(SUFFIXES) else None
        if told:
            role, beginning = told
            found = groups.setdefault((path.parent, beginning), {})
            if role in found:
                both = f"{shown(found[role].name)} and {shown(path.name)}"
                raise UserError(f"{spelt(path.parent)} holds two {role} files of one case, {both}: take one out.")
            found[role] = path
            stay_inside(folder, path)
    _join_lone_labels(groups)
    cases, lacking, beginnings = [], [], []
    held = Counter(place for place, _ in groups)  # cases of each folder
    for (place, beginning), found in sorted(groups.items()):
        alone = held[place] == 1
        title = place.name if place != folder else place.resolve().name
        name = usable(title if alone else beginning, place)
        missing = [channel for channel in CHANNELS if channel not in found]
        if missing:
            where, what = (place, "folder") if alone else (place / f"{beginning}*", "case")
            lacking.append((name, f"{spelt(where)} has no {missing[0]} file: add it or take the {what} out."))
            continue
        cases.append(CaseFiles(name, tuple(found[channel] for channel in CHANNELS), found.get(LABEL)))
        beginnings.append(beginning)
    if len({case.id for case in cases}) < len(cases) == len(set(beginnings)) and all(beginnings):
        # folders within each patient's own, such as anat: the files' names tell who it is
        cases = [replace(case, id=usable(name, case.images[0])) for case, name in zip(cases, beginnings, strict=True)]
    refuse_twins(cases, folder)
    return cases, lacking


def role_of(stem: str) -> tuple[str, str] | None:
    """What a file is by its name, and how its case's names begin; None for others. The longest ending counts."""
    endings = [(len(ending), role) for role, all_of_it in ENDINGS.items() for ending in all_of_it
               if stem.lower() == ending or stem.lower().endswith((f"_{ending}", f"-{ending}"))]  # fmt: skip
    if not endings:
        return None
    length, role = max(endings)
    return role, stem[: len(stem) - length].rstrip("_-")


def _join_lone_labels(groups: dict[tuple[Path, str], Files]) -> None:
    """A folder's only label may bear another name than its only scan, as that of case 355 of BraTS 2020 does."""
    for place in {place for place, _ in groups}:
        mine = {key: found for key, found in groups.items() if key[0] == place}
        lone = [key for key, found in mine.items() if set(found) == {LABEL}]
        scans = [key for key, found in mine.items() if LABEL not in found]
        if len(mine) == 2 and len(lone) == len(scans) == 1:
            groups[scans[0]][LABEL] = groups.pop(lone[0])[LABEL]
