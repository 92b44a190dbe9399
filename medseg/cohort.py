"""Labelled cases that members are judged on, from a data folder or from a prepared cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medseg.cache import Cache, read_grid, read_label_map, reference_name
from medseg.findings import voxel_sizes
from medseg.geometry import Grid
from medseg.members import Member, Prepared, preparing
from medseg.msd import read_dataset
from medseg.preparation import Preparation, in_words
from medseg.scan import read_scan
from medtrain.errors import UserError
from medtrain.files import file_stamp
from medtrain.recipe import build


@dataclass(frozen=True)
class LabelledCase:
    """A case as members see it and as it is judged.

    `reference` holds the cohort's codes, with voxels of `spacing_mm` along its axes: if `whole`, on the file's own grid
    (X,Y,Z), else in the crop box at the scan's own spacing (D,H,W).
    """

    prepared: Prepared
    reference: np.ndarray
    spacing_mm: Sequence[float]
    whole: bool


class ScanCohort:
    """A data folder in MSD, nnU-Net or BraTS form, judged on the files' own grids."""

    def __init__(self, folder: Path, label_map: str = "auto"):
        found = read_dataset(folder, label_map)
        self.origin, self.label_map = folder, found.label_map
        self._files = {case.id: case for case in found.cases}
        self.ids = sorted(self._files)

    def check(self, run: Path, member: Member) -> None:
        """Scans can be prepared for any member."""

    def stamp(self, case: str) -> list[Any]:
        """What tells whether a case's files are still the same."""
        files = self._files[case]
        return [[str(path), *file_stamp(path)] for path in (*files.images, files.label) if path]

    def read(self, case: str) -> LabelledCase:
        """Prepare a scan as a new one is: the members do not profit from its label's box."""
        scan = read_scan(self._files[case], self.label_map)
        assert scan.label_XYZ is not None
        spacing_mm = nib.affines.voxel_sizes(scan.affine).tolist()
        return LabelledCase(preparing(case, scan, self.label_map), scan.label_XYZ, spacing_mm, whole=True)


class CacheCohort:
    """A prepared cache, judged in each case's crop box at the scan's own spacing: it holds all of the label."""

    def __init__(self, path: Path):
        self.origin, self.cache = path, Cache(path, verify=True)
        self.label_map, self.ids = read_label_map(self.cache), self.cache.ids
        self.preparation = build(Preparation, self.cache.preparation, f"{path}, preparation")

    def check(self, run: Path, member: Member) -> None:
        """The cache must have been prepared as the member's training data was."""
        ours, theirs = self.preparation, member.preparation
        if ours.version != theirs.version:
            raise UserError(f"{self.origin} was prepared by another version of this program: prepare it again.")
        if ours.spacing_mm != theirs.spacing_mm:
            raise UserError(
                f"{self.origin} was prepared at {ours.spacing_mm:g} mm, the data of {run} at {theirs.spacing_mm:g} mm "
                "(0: the scans' own spacing): give --data and the folder it was made from."
            )
        odd_mm = next((mm for mm in voxel_sizes(self.cache).tolist() if theirs.target_mm(mm)), None)
        if odd_mm and not theirs.spacing_mm:
            raise UserError(
                f"{self.origin} has voxels of {in_words(odd_mm)}, the training scans of {run} of "
                f"{in_words(theirs.voxel_mm or ())}: give --data and the folder it was made from."
            )

    def stamp(self, case: str) -> list[Any]:
        """What tells whether the cache is still the same."""
        return [self.cache.fingerprint]

    def read(self, case: str) -> LabelledCase:
        """A case as it was prepared."""
        grid = read_grid(self.cache, case)
        image, reference = self.cache.read(case, "image"), self.cache.read(case, reference_name(self.cache, case))

        def prepared(how: Preparation) -> tuple[np.ndarray, Grid]:
            return image, grid

        return LabelledCase(prepared, reference, grid.voxel_mm, whole=False)


Cohort = ScanCohort | CacheCohort
