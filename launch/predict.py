"""Predict label maps: `predict.py --members RUN... --image X.nii.gz|DIR --out DIR`."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medtrain.errors import UserError, exit_code

if TYPE_CHECKING:
    from medseg.msd import CaseFiles


def find_images(place: Path) -> list["CaseFiles"]:
    """The scans a path names: one 4D file, a folder of them (or its imagesTs), or BraTS case folders."""
    from medseg.msd import SUFFIXES, CaseFiles, case_id, find_case_folders

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


def refuse_overwriting(cases: Sequence["CaseFiles"], out: Path) -> None:
    """UserError where a label map would replace a scan or another label map."""
    seen: set[str] = set()
    for case in cases:
        target = out / f"{case.id}.nii.gz"
        if any(target.resolve() == image.resolve() for image in case.images):
            raise UserError(f"{target} is the scan itself: give another --out.")
        if case.id in seen:
            raise UserError(f"{case.images[0].parent} has two scans named {case.id}: rename one.")
        seen.add(case.id)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=Path, nargs="+", required=True, help="run folders; several are averaged")
    parser.add_argument("--image", type=Path, required=True, help="4D NIfTI, folder of them, or BraTS case folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for <case>.nii.gz")
    parser.add_argument("--weights", type=float, nargs="+", help="one weight a member (default: equal)")
    options = parser.parse_args(argv)
    weights = options.weights or [1.0] * len(options.members)
    if len(weights) != len(options.members) or not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
        raise UserError(f"--weights needs {len(options.members)} numbers, one a member, at least one above 0.")
    cases = find_images(options.image)
    refuse_overwriting(cases, options.out)
    import torch

    from medseg.members import load_members, predict_scan
    from medtrain.progress import track

    members = load_members(options.members, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for case in track(cases, len(cases), "predict"):
        predict_scan(case, members, weights, options.out)
    print(f"{len(cases)} label map{'s' if len(cases) > 1 else ''} in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
