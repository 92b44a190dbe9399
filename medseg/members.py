"""Trained members, used together: from a prepared case or a raw scan to one label map."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Self

import numpy as np
import torch

from medseg import infer, models
from medseg.cache import Case
from medseg.cases import CaseFiles
from medseg.findings import NO_BRAIN, is_whole_head
from medseg.geometry import Grid, paste, to_nifti
from medseg.labels import LabelMap
from medseg.preparation import LEAST_MM, Preparation, in_words, prepare_case
from medseg.recipes import SegRecipe, window_of
from medseg.scan import Scan, read_scan
from medtrain.ensemble import weighted_mean
from medtrain.errors import UserError
from medtrain.files import replacing
from medtrain.recipe import build
from medtrain.strategy import Forward
from medtrain.trained import read_best, restored

# The image (C,D,H,W) and grid of a case, prepared in the way that a member needs.
Prepared = Callable[[Preparation], tuple[np.ndarray, Grid]]


@dataclass
class Member:
    """A run's best weights, ready to predict. `score` is its validation score, if it had a validation."""

    name: str
    recipe: SegRecipe
    forward: Forward
    label_map: LabelMap
    preparation: Preparation
    score: float | None

    @classmethod
    def load(cls, run: Path, device: torch.device) -> Self:
        """Read a run folder's checkpoint_best.pt; raises UserError."""
        path, content = read_best(run, label_map=dict, score=float | None)
        recipe = SegRecipe.from_json(content["recipe"], str(path))
        preparation = build(Preparation, content["preparation"], f"{path}, preparation")
        try:
            label_map = LabelMap.from_dict(content["label_map"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path} does not tell what its labels mean: name another brats run.") from None
        if preparation.version != Preparation().version:
            raise UserError(f"{path} is of data prepared by another version of this program: train it again.")
        if 0 < preparation.spacing_mm < LEAST_MM:
            raise UserError(
                f"{path}, preparation: spacing_mm {preparation.spacing_mm:g} is no voxel size: train it again."
            )
        models.try_kernels(recipe)
        forward = restored(path, content, recipe, lambda: models.build_model(recipe), device)
        return cls(recipe.name, recipe, forward, label_map, preparation, content["score"])

    @property
    def way(self) -> tuple[object, ...]:
        """What members must have in common to go over a scan's windows together."""
        return self.preparation, window_of(self.recipe), self.recipe.evaluate, self.recipe.model.kernels


def native_probs(members: Sequence[Member], prepared: Prepared) -> Iterator[np.ndarray]:
    """Each member's region probabilities (3,D,H,W) in the crop box at the scan's own spacing, in their order, from the
    image (C,D,H,W) and grid that `prepared` gives. Neighbours that go the same way go over the windows together.
    """
    for _, some in groupby(members, key=lambda member: member.way):
        together = list(some)
        first = together[0]
        image, grid = prepared(first.preparation)
        for probs in infer.member_probs([member.forward for member in together], image, first.recipe,
                                        flips=first.recipe.evaluate.flips):  # fmt: skip
            yield infer.to_native(probs, grid.native)


def load_members(runs: Sequence[Path], device: torch.device) -> list[Member]:
    """Load members that may be averaged: one label map for all, or a UserError."""
    members = [Member.load(run, device) for run in runs]
    for run, member in zip(runs, members, strict=True):
        if member.label_map != members[0].label_map:
            raise UserError(
                f"{run} was trained under label map {member.label_map.name}, {runs[0]} under "
                f"{members[0].label_map.name}: members of one ensemble must share it."
            )
    return members


def preparing(case_id: str, scan: Scan, label_map: LabelMap) -> Prepared:
    """Prepares a scan as members need it, each way once, and without its label: a new scan has none.

    A scan whose voxels are not those of a member's training scans is resampled for it, and a line says so.
    """
    told: set[object] = set()

    @cache
    def prepared(how: Preparation) -> tuple[np.ndarray, Grid]:
        case = prepare_case(case_id, replace(scan, label_XYZ=None), label_map, how)
        _tell_resampled(case, case_id, how, told)
        if is_whole_head(case.facts) and not told & {NO_BRAIN}:
            told.add(NO_BRAIN)
            print(f"note: case {case_id} {NO_BRAIN}.", flush=True)
        return case.image_CDHW, Grid.from_dict(case.facts["grid"])

    return prepared


def predict_scan(files: CaseFiles, members: Sequence[Member], weights: Sequence[float], out: Path) -> Path:
    """Prepare a scan as each member's training data was, average, and write `<id>.nii.gz` on the scan's own grid and
    in the codes of the members' data set.
    """
    label_map = members[0].label_map
    prepared = preparing(files.id, read_scan(CaseFiles(files.id, files.images, None), label_map), label_map)
    combined = weighted_mean(native_probs(members, prepared), weights)
    _, grid = prepared(members[0].preparation)
    path = out / f"{files.id}.nii.gz"
    with replacing(path) as temporary:
        to_nifti(paste(label_map.in_files().label(combined), grid), grid).to_filename(temporary)
    return path


def _tell_resampled(case: Case, name: str, how: Preparation, told: set[object]) -> None:
    """Say once that a scan has other voxels than the training scans that were kept at their own."""
    own_mm = case.facts["voxel_mm"]
    if how.spacing_mm or how.target_mm(own_mm) is None or how.voxel_mm in told:
        return
    told.add(how.voxel_mm)
    print(
        f"note: case {name} has voxels of {in_words(own_mm)}, the training scans of {in_words(how.voxel_mm or ())}: "
        "it is resampled to theirs for the network, and answered on its own grid.",
        flush=True,
    )
