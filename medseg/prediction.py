"""Predict label maps of scans: which files a path names, and what must not be overwritten."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medseg import nnunet
from medseg.brats import find_case_folders
from medseg.cases import SUFFIXES, CaseFiles, case_id
from medseg.claim import claimed
from medseg.kept import Kept, digest, weights_of
from medseg.members import load_members, predict_scan
from medseg.nifti import Unreadable
from medtrain.aside import Aside, report
from medtrain.errors import UserError
from medtrain.files import file_stamp
from medtrain.paths import spelt, stay_inside
from medtrain.progress import track
from medtrain.run_folder import owner_of
from medtrain.trained import default_device

LISTING = "set_aside.csv"
KEPT = "prediction-{}.jsonl"  # until every scan had its turn


def predict(runs: Sequence[Path], weights: Sequence[float], place: Path, out: Path) -> tuple[str, int]:
    """Write `<case>.nii.gz` into `out` for every scan that `place` names; returns a sentence about it, and how many
    scans were set aside.

    In a folder a scan that can not be used does not stop the others: it is told at the end, and listed in
    `set_aside.csv` in `out`. Where it was cut off, another call goes on. Raises UserError where there is none that can
    be used.
    """
    cases, aside = find_images(place)
    if out.suffix.lower() == ".csv":
        raise UserError(f"{out}: label maps of scans need a folder: give --out DIR.")
    refuse_overwriting(cases, out)
    if out.resolve() == place.resolve():
        raise UserError(f"{out} is the folder of the scans, label maps would be taken for some: give another --out.")
    if owner := owner_of(out):
        raise UserError(f"{out} belongs to {owner}, whose files are not overwritten: give another --out.")
    about = [weights_of(runs), list(weights), str(place.absolute())]
    members = load_members(runs, default_device())
    total = len(cases) + len(aside)
    codes = members[0].label_map.in_files().in_words()
    with claimed(out, runs, weights, codes):
        kept = Kept(out / KEPT.format(digest(about)), about)
        todo = [case for case in cases if kept.get(case.id, [_stamp(case), file_stamp(_target(case, out))]) is None]
        if len(todo) < len(cases):
            print(f"{len(cases) - len(todo)} of {len(cases)} scans are predicted already", flush=True)
        for case in track(todo, len(todo), "predict"):
            stamp = _stamp(case)
            try:
                predict_scan(case, members, weights, out)
                kept.add(case.id, {}, [stamp, file_stamp(_target(case, out))])
            except Unreadable:  # not the scan's fault
                raise
            except UserError as error:
                if total == 1:
                    raise
                aside.append((case.id, str(error)))
                if _target(case, out).exists():
                    print(f"WARNING: {_target(case, out)} is of an earlier call", file=sys.stderr)
        kept.path.unlink(missing_ok=True)
    if place.is_dir():
        report(sorted(aside), out / LISTING, "scan", root=place)
    if len(aside) == total:
        raise UserError(f"no scan of {spelt(place)} can be used: see {out / LISTING}, and repair the scans.")
    made = total - len(aside)
    return f"{made} label map{'s' if made > 1 else ''} in {out} (codes: {codes})", len(aside)


def _stamp(case: CaseFiles) -> list[Any]:
    """What tells whether a scan is still the same."""
    return [[str(path), *file_stamp(path)] for path in case.images]


def _target(case: CaseFiles, out: Path) -> Path:
    return out / f"{case.id}.nii.gz"


def find_images(place: Path) -> tuple[list[CaseFiles], list[Aside]]:
    """The scans a path names: one 4D file, a folder of them (or its imagesTs), nnU-Net's files of a channel each, or
    BraTS case folders; then those that lack a channel, with the reason. Raises UserError where there are no others.
    """
    if place.is_file():
        return [CaseFiles(case_id(place), (place,), None)], []
    if not place.is_dir():
        raise UserError(f"{spelt(place)} is not there: give a NIfTI file or a folder of them.")
    scans = partial(nnunet.scans, place=place)
    for folder in (place, place / "imagesTs"):
        stay_inside(place, folder)
        files = sorted(path for path in folder.glob("*.nii*") if path.name.endswith(SUFFIXES) and path.is_file())
        whole = [path for path in files if not path.name.startswith(".")]
        for found in (find_case_folders, scans) if folder == place else (scans,):
            cases, lacking = found(folder)
            if lacking and not cases:
                raise UserError(lacking[0][1])
            if cases:
                return cases, lacking
        for path in whole:
            stay_inside(place, path)
        if whole:
            return [CaseFiles(case_id(path), (path,), None) for path in whole], []
    raise UserError(f"{spelt(place)} holds no .nii or .nii.gz file: give a NIfTI file or a folder of them.")


def refuse_overwriting(cases: Sequence[CaseFiles], out: Path) -> None:
    """UserError where a label map would replace a scan or another label map."""
    seen: set[str] = set()
    for case in cases:
        target = _target(case, out)
        if any(target.resolve() == image.resolve() for image in case.images):
            raise UserError(f"{spelt(target)} is the scan itself: give another --out.")
        if case.id in seen:
            raise UserError(f"{spelt(case.images[0].parent)} has two scans named {case.id}: rename one.")
        seen.add(case.id)
