"""One scan with its label in memory, checked: what would be learnt wrongly without a word is refused.

Legend of shapes: C channels, X Y Z the file's voxel axes.
"""

from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import nibabel as nib
import numpy as np

from medseg.cases import CHANNELS, CaseFiles
from medseg.labels import RECODED, LabelMap
from medseg.nifti import read_nifti
from medtrain.errors import UserError
from medtrain.paths import spelt
from medtrain.wording import shown

LEAST_MM, MOST_MM = 0.02, 50.0  # of a voxel; beyond lie headers in metres or micrometres
APART = 0.1  # of a voxel: how far the corners of two grids may lie apart that are the same
BETWEEN = 0.01  # how far a label's value may be from a whole number


@dataclass(frozen=True)
class Scan:
    """One scan in memory: image (C,X,Y,Z) float32 in scanner units, label (X,Y,Z) uint8 or None, affine, header."""

    image_CXYZ: np.ndarray
    label_XYZ: np.ndarray | None
    affine: np.ndarray
    header: bytes


def read_scan(case: CaseFiles, label_map: LabelMap) -> Scan:
    """Load one case and check it; raises UserError naming the file that is wrong."""
    loaded = [read_nifti(path) for path in case.images]
    first, affine = case.images[0], loaded[0][1]
    if len(loaded) == 1:
        image = _channels_first(first, loaded[0][0])
    else:
        for path, (data, found, _) in zip(case.images, loaded, strict=True):
            if data.ndim != 3:
                raise UserError(
                    f"{spelt(path)} has shape {data.shape}, not (X, Y, Z): give each channel a file of its own."
                )
            if data.shape != loaded[0][0].shape:
                raise UserError(
                    f"{spelt(path)} has shape {data.shape}, not that of {shown(first.name)}: register the channels."
                )
            _same_grid(path, found, first, affine, data.shape)
        image = np.stack([data for data, _, _ in loaded])
    _check_voxels(case, image, affine)
    label = None if case.label is None else _read_label(case, image.shape[1:], affine, label_map)
    return Scan(np.ascontiguousarray(image), label, affine, loaded[0][2])


def _channels_first(path: Path, data: np.ndarray) -> np.ndarray:
    """(X,Y,Z,C), or ITK's vectors (X,Y,Z,1,C), as (C,X,Y,Z)."""
    if data.ndim == 5 and data.shape[3] == 1:
        data = data[:, :, :, 0]
    if data.ndim == 4 and data.shape[3] == len(CHANNELS):
        return np.moveaxis(data, 3, 0)
    if data.ndim == 4 and data.shape[0] == len(CHANNELS):
        raise UserError(f"{spelt(path)} has shape {data.shape}, its channels first: move that axis to the end.")
    raise UserError(f"{spelt(path)} has shape {data.shape}, not (X, Y, Z, 4): give all four channels.")


def _check_voxels(case: CaseFiles, image_CXYZ: np.ndarray, affine: np.ndarray) -> None:
    """Sizes of voxels that can be, and channels that tell something."""
    path = case.images[0]
    sizes = np.abs(nib.affines.voxel_sizes(affine))
    if not (sizes.min() >= LEAST_MM and sizes.max() <= MOST_MM):
        told = " x ".join(f"{size:.3g}" for size in sizes)
        raise UserError(f"{spelt(path)} has voxels of {told} mm: correct its header's voxel size or unit.")
    if not np.isfinite(image_CXYZ).all():
        raise UserError(f"{spelt(path)} holds NaN or infinite voxels: export it again or take the case out.")
    for name, volume in zip(CHANNELS, image_CXYZ, strict=True):
        signal = volume[volume != 0]
        if not signal.size or signal.min() == signal.max():
            what = f"one value, {signal[0]:g}," if signal.size else "zero"
            raise UserError(
                f"{spelt(path)} is {what} everywhere in a channel ({name}): export it again or take the case out."
            )
    for (one, a), (other, b) in combinations(zip(CHANNELS, image_CXYZ, strict=True), 2):
        if np.array_equal(a, b):
            raise UserError(
                f"{spelt(path)}: {one} and {other} are the same volume: export it again or take the case out."
            )


def _read_label(case: CaseFiles, shape: tuple[int, ...], affine: np.ndarray, label_map: LabelMap) -> np.ndarray:
    assert case.label is not None
    data, found, _ = read_nifti(case.label)
    if data.shape != shape:
        raise UserError(f"{spelt(case.label)} has shape {data.shape}, its image {shape}: they must be on one grid.")
    _same_grid(case.label, found, case.images[0], affine, shape)
    codes = np.rint(data)
    if not (np.abs(data - codes) <= BETWEEN).all():  # also where it is no number
        raise UserError(f"{spelt(case.label)} holds values between codes: resample it again, with nearest neighbours.")
    recoded = RECODED.get(label_map.name, {})
    known = {0, *recoded} if recoded else {0, label_map.edema, label_map.core, label_map.enhancing}
    odd = codes[~np.isin(codes, list(known))]
    if odd.size:
        cavity = ", brats24 where 4 is the cavity of an operation" if odd.min() == 4 else ""
        raise UserError(
            f"{spelt(case.label)} holds the label code {odd.min():g}, label map {label_map.name} knows "
            f"{sorted(known)}: give the right --label-map{cavity}."
        )
    label = codes.astype(np.uint8)
    if recoded:
        table = np.arange(256, dtype=np.uint8)
        table[list(recoded)] = list(recoded.values())
        label = table[label]
    return label


def _same_grid(path: Path, affine: np.ndarray, first: Path, first_affine: np.ndarray, shape: tuple[int, ...]) -> None:
    """A label stored left-right mirrored beside its image would else be learnt without a word."""
    corners = np.array([[*corner, 1] for corner in product(*((0, n - 1) for n in shape))], float)
    gap = np.linalg.norm(corners @ (affine - first_affine)[:3].T, axis=1).max()
    if gap <= APART * np.abs(nib.affines.voxel_sizes(first_affine)).min():
        return
    if any(np.allclose(affine, np.diag([sign, sign, 1, 1])) for sign in (1, -1)):  # as ITK writes it
        remedy = f"it states no place of its own: copy the affine of {shown(first.name)} if the voxels correspond"
    elif nib.aff2axcodes(affine) != nib.aff2axcodes(first_affine):
        axes = ["".join(nib.aff2axcodes(matrix)) for matrix in (affine, first_affine)]
        remedy = f"its axes run {axes[0]}, the others' {axes[1]}: reorient it (nibabel.as_reoriented)"
    else:
        remedy = f"they are {gap:.2g} mm apart: resample it"
    raise UserError(f"{spelt(path)} lies on another grid than {shown(first.name)} (their affines differ): {remedy}.")
