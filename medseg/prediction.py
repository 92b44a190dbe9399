"""Predict label maps of scans: which files a path names, and what must not be overwritten."""

from collections.abc import Sequence
from pathlib import Path

import torch

from medseg.members import load_members, predict_scan
from medseg.msd import SUFFIXES, CaseFiles, case_id, find_case_folders
from medtrain.errors import UserError
from medtrain.progress import track


def predict(runs: Sequence[Path], weights: Sequence[float], place: Path, out: Path) -> str:
    """Write `<case>.nii.gz` into `out` for every scan that `place` names; returns a sentence about it."""
    cases = find_images(place)
    refuse_overwriting(cases, out)
    members = load_members(runs, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for case in track(cases, len(cases), "predict"):
        predict_scan(case, members, weights, out)
    return f"{len(cases)} label map{'s' if len(cases) > 1 else ''} in {out}"


def find_images(place: Path) -> list[CaseFiles]:
    """The scans a path names: one 4D file, a folder of them (or its imagesTs), or BraTS case folders."""
    if place.is_file():
        return [CaseFiles(case_id(place), (place,), None)]
    if not place.is_dir():
        raise UserError(f"{place} is not there: give a NIfTI file or a folder of them.")
    for folder in (place, place / "imagesTs"):
        files = sorted(path for path in folder.glob("*.nii*") if path.name.endswith(SUFFIXES))
        whole = [path for path in files if not path.name.startswith(".")]
        cases = find_case_folders(folder) if folder == place else []
        if cases:
            return cases
        if whole:
            return [CaseFiles(case_id(path), (path,), None) for path in whole]
    raise UserError(f"{place} holds no .nii or .nii.gz file: give a NIfTI file or a folder of them.")


def refuse_overwriting(cases: Sequence[CaseFiles], out: Path) -> None:
    """UserError where a label map would replace a scan or another label map."""
    seen: set[str] = set()
    for case in cases:
        target = out / f"{case.id}.nii.gz"
        if any(target.resolve() == image.resolve() for image in case.images):
            raise UserError(f"{target} is the scan itself: give another --out.")
        if case.id in seen:
            raise UserError(f"{case.images[0].parent} has two scans named {case.id}: rename one.")
        seen.add(case.id)
