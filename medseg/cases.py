"""Cases as files: their names and channels, whatever form a data set has."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medtrain.errors import UserError
from medtrain.paths import is_formula, spelt
from medtrain.wording import plain, shown

CHANNELS = ("FLAIR", "T1w", "T1Gd", "T2w")
SUFFIXES = (".nii.gz", ".nii")
SPELLINGS = {
    "FLAIR": ("flair", "t2flair", "t2f"),
    "T1w": ("t1", "t1w", "t1n"),
    "T1Gd": ("t1gd", "t1ce", "t1c", "t1wgd", "gdt1w", "t1post"),
    "T2w": ("t2", "t2w"),
}
NAMED_BY_PATIENT = re.compile(
    r"(BraTS-[A-Za-z0-9]+-\d+)-\d+|(sub-[A-Za-z0-9]+)(?:_.*)?|(UPENN-GBM-\d+)_\d+|(UCSF-PDGM-\d+)(?:_.*)?"
)


@dataclass(frozen=True)
class CaseFiles:
    """One case: a 4D file or four 3D files in the order of CHANNELS, and its label if there is one."""

    id: str
    images: tuple[Path, ...]
    label: Path | None


def channel_of(name: str) -> str:
    """Which of CHANNELS a data set means by a name of its own; "" for none."""
    plainly = name.lower().replace("-", "").replace("_", "")
    return next((channel for channel, spellings in SPELLINGS.items() if plainly in spellings), "")


def patient_of(case: str) -> str:
    """Whose scan a case is by the names of BraTS 2023 (`BraTS-GLI-00005-001` is one of patient 00005), of BIDS
    (`sub-01_ses-2`) and of UPENN-GBM (`UPENN-GBM-00001_21`). Else its own name.
    """
    found = NAMED_BY_PATIENT.fullmatch(case)
    return next(filter(None, found.groups())) if found else case


def case_id(path: Path) -> str:
    """A file's name without .nii or .nii.gz."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return usable(path.name.removesuffix(suffix), path)
    raise UserError(f"{spelt(path)} is not a NIfTI file by name: it must end in .nii or .nii.gz.")


def usable(name: str, path: Path) -> str:
    """A case's name, a file's, a cache group's and a table row's; UserError for what is invalid as one."""
    if name in ("", ".", "..") or not plain(name):
        raise UserError(f"{spelt(path)}: {shown(name)!r} can be no name of a case: rename it.")
    if is_formula(name):
        raise UserError(f"{spelt(path)}: spreadsheets take {shown(name)!r} for a formula: rename it.")
    return name


def refuse_twins(cases: Sequence[CaseFiles], where: Path) -> None:
    """UserError where two cases have one name."""
    seen: dict[str, CaseFiles] = {}
    for case in cases:
        if case.id in seen:
            raise UserError(f"{spelt(where)} has two cases named {shown(case.id)}: rename or remove one.")
        seen[case.id] = case
