"""Synthetic brain-tumour cases, and an MSD folder of them, for demos and checks that have no real data."""

import gzip
import json
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import affines, orientations
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medtrain.files import replacing

CHANNELS = ("FLAIR", "T1w", "t1gd", "T2w")
EDEMA, NON_ENHANCING, ENHANCING = 1, 2, 3
DEFAULT_SHAPE = (96, 112, 80)
Shape = tuple[int, int, int]
Points = list[np.ndarray]  # right, anterior, superior position (X, Y, Z each) in mm of the reference head
Maps = dict[str, np.ndarray]  # name of a tissue: its fraction (X, Y, Z)
Rng = np.random.Generator
_Focus = namedtuple("_Focus", "centre_mm axes core_mm rim_mm edema_mm")

_FIELD_MM = np.array([192.0, 224.0, 160.0])  # of the reference head, so that every grid shape shows all of it
# Relative signal (FLAIR, T1w, T1Gd, T2w) of each tissue, tuned to the z-scored means of BraTS'18 cases.
_SIGNAL = {
    "csf": (0.28, 0.40, 0.46, 1.90),
    "grey": (1.08, 0.90, 0.92, 1.04),
    "white": (0.94, 1.16, 1.09, 0.80),
    "edema": (1.55, 1.06, 1.05, 1.42),
    "non_enhancing": (1.62, 0.92, 0.95, 1.78),
    "necrosis": (1.50, 0.84, 0.88, 2.05),
    "enhancing": (1.52, 1.02, 1.58, 1.52),
}
_ORIENTATION_CHANCES = {"LPS": 0.6, "RAS": 0.2, "PIR": 0.2}  # MSD has LPS; the others need the affine honoured
_GRADE_CHANCES = {"ring": 0.66, "not enhancing": 0.16, "solid": 0.1, "no edema": 0.08}


@dataclass(frozen=True)
class Phantom:
    """image_XYZC: float32 (X, Y, Z, 4), channels FLAIR, T1w, T1Gd, T2w, 0 outside the brain and >= 1 inside;
    label_XYZ: uint8 (X, Y, Z), 0 background, 1 edema, 2 non-enhancing, 3 enhancing; affine: (4, 4), index to RAS+ mm.
    """

    image_XYZC: np.ndarray
    label_XYZ: np.ndarray
    affine: np.ndarray


def make_case(seed: int, index: int, *, shape: Shape = DEFAULT_SHAPE, spacing_mm: float = 2.0) -> Phantom:
    """Make case `index` of the series `seed`; the same two numbers always give the same case.

    shape is the grid (right, anterior, superior) that holds the whole head; an orientation with permuted axes returns
    the same sizes permuted. spacing_mm is the nominal voxel edge in mm; a case differs from it by up to 4 percent.
    Raises ValueError for a negative seed or index, a side below 24 voxels, or a spacing that is not above 0.
    """
    _check_request(seed, index, shape, spacing_mm)
    rng = np.random.default_rng((seed, index))
    spacing = np.round(spacing_mm * rng.uniform(0.96, 1.04, 3), 4)
    rotation = Rotation.from_euler("xyz", rng.uniform(-0.14, 0.14, 3) * (rng.random() < 0.25)).as_matrix()
    points = _head_points(shape, spacing, rotation)
    depth_XYZ = _brain_depth(rng, points)
    foci = _plan_foci(rng, points, depth_XYZ)
    tissue = _tissue_maps(rng, _push_aside(points, foci), depth_XYZ)
    label_XYZ = _grow_tumour(rng, points, foci, depth_XYZ, tissue)
    return _store(rng, _acquire(rng, tissue, label_XYZ, depth_XYZ > 0), label_XYZ, rotation * spacing)


def write_dataset(
    folder: Path,
    *,
    cases: int = 24,
    seed: int = 0,
    shape: Shape = DEFAULT_SHAPE,
    spacing_mm: float = 2.0,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write cases 0..cases-1 of the series `seed` as an MSD folder and return `folder`.

    Images are int16 (X, Y, Z, 4), labels uint8 (X, Y, Z), in mm; the same arguments give the same bytes. dataset.json
    comes last: a folder without it is unfinished. workers counts threads; progress(done, total) is called in this one.
    Raises ValueError for cases or workers below 1 and for what make_case refuses, FileExistsError where the folder
    already holds another dataset, OSError where it cannot be written. shape and spacing_mm are make_case's.
    """
    _check_request(seed, 0, shape, spacing_mm)
    if min(cases, workers) < 1:
        raise ValueError(f"cases and workers must be at least 1, got cases={cases}, workers={workers}")
    description = folder / "dataset.json"
    if description.exists() and '"name": "PHANTOM"' not in description.read_text():
        raise FileExistsError(f"{folder} holds a dataset that is not a phantom; choose another folder")
    # An interrupted rewrite must not pass for the finished dataset that was here before.
    description.unlink(missing_ok=True)
    pool = ThreadPoolExecutor(workers)
    try:
        written = pool.map(lambda index: _write_case(folder, seed, index, shape, spacing_mm), range(cases))
        for done, _ in enumerate(written, start=1):
            if progress is not None:
                progress(done, cases)
    finally:
        pool.shutdown(cancel_futures=True)
    with replacing(description, flush=False) as part:
        part.write_text(json.dumps(_dataset_description(cases), indent=1), encoding="utf-8")
    return folder


def _check_request(seed: int, index: int, shape: Shape, spacing_mm: float) -> None:
    if min(seed, index) < 0 or len(shape) != 3 or min(shape) < 24 or not 0 < spacing_mm < np.inf:
        raise ValueError(f"need {seed=} and {index=} >= 0, 3 sides >= 24 in {shape=}, a finite {spacing_mm=} > 0")


def _head_points(shape: Shape, spacing: np.ndarray, rotation: np.ndarray) -> Points:
    centred = np.indices(shape, np.float32) - (np.reshape(shape, (3, 1, 1, 1)).astype(np.float32) - 1) / 2
    to_head = (_FIELD_MM / (np.array(shape) * spacing))[:, None] * rotation * spacing
    return list(np.einsum("ij,jxyz->ixyz", to_head.astype(np.float32), centred))


def _noise(rng: Rng, shape: tuple[int, ...], knot_mm: float) -> np.ndarray:
    """Smooth noise, mean 0 and deviation 1: a cubic B-spline over random knots `knot_mm` reference mm apart."""
    steps = _FIELD_MM / np.array(shape) / knot_mm
    field = rng.standard_normal(np.ceil(shape * steps).astype(int) + 4, dtype=np.float32)
    for axis in (2, 1, 0):
        position = np.arange(shape[axis]) * steps[axis]
        u = (position % 1).astype(np.float32)
        weights = ((1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3)
        column = [-1 if k == axis else 1 for k in range(3)]
        field = sum(np.take(field, position.astype(int) + k, axis) * w.reshape(column) for k, w in enumerate(weights))
    return (field - field.mean()) / field.std()


def _ramp(value: np.ndarray, start: float, stop: float) -> np.ndarray:
    return np.clip((value - start) / (stop - start), 0, 1)


def _ellipsoid_depth(points: Points, centre_mm: tuple, radii_mm: tuple) -> np.ndarray:
    squares = [((p - c) / r) ** 2 for p, c, r in zip(points, centre_mm, radii_mm, strict=True)]
    return (1 - np.sqrt(sum(squares))) * float(np.mean(radii_mm))


def _brain_depth(rng: Rng, points: Points) -> np.ndarray:
    x, y, z = points
    size = rng.uniform(0.94, 1.03, 3)
    # The forehead is narrower than the back, and the base of the brain is flat.
    taper = 1 + 0.0016 * y + 0.000012 * y**2
    cerebrum = _ellipsoid_depth([x * taper, y, np.where(z < 0, z * 1.25, z)], (0, 2, 2), tuple(size * (72, 86, 66)))
    cerebellum = _ellipsoid_depth([np.abs(x), y, z], (18, -46, -38), tuple(size * (31, 28, 24)))
    stem = _ellipsoid_depth([x, y - 0.2 * z, z], (0, -12, -48), tuple(size * (14, 15, 34)))
    rough = 1.2 * _noise(rng, x.shape, 24) + 0.5 * _noise(rng, x.shape, 8)
    return np.maximum(np.maximum(cerebrum, cerebellum), stem) + rough


def _plan_foci(rng: Rng, points: Points, depth_XYZ: np.ndarray) -> list[_Focus]:
    lateral, level = np.abs(points[0]) > 14, np.abs(points[2] - 12) < 34
    sites = np.flatnonzero((depth_XYZ > 19) & (depth_XYZ < 42) & lateral & level)
    grade = str(rng.choice(list(_GRADE_CHANCES), p=list(_GRADE_CHANCES.values())))
    foci = []
    for size in (1, 0.65, 0.55)[: rng.choice([1, 2, 3], p=[0.76, 0.17, 0.07])]:
        site = rng.choice(sites)
        core_mm = rng.uniform(16, 25) * size * {"solid": 0.8, "no edema": 1.25}.get(grade, 1)
        rim_mm = {"not enhancing": 0.0, "solid": 99.0}.get(grade, rng.uniform(0.26, 0.42) * core_mm)
        edema_mm = 0.0 if grade == "no edema" else rng.uniform(12, 20) * size**0.5
        axes = Rotation.from_euler("xyz", rng.uniform(-3.1, 3.1, 3)).as_matrix() / rng.uniform(0.8, 1.2, (3, 1))
        foci.append(_Focus([p.flat[site] for p in points], axes.astype(np.float32), core_mm, rim_mm, edema_mm))
    return foci


def _distance(points: Points, focus: _Focus) -> np.ndarray:
    offset = [p - c for p, c in zip(points, focus.centre_mm, strict=True)]
    return np.sqrt(sum(sum(axis[k] * offset[k] for k in range(3)) ** 2 for axis in focus.axes))


def _push_aside(points: Points, foci: list[_Focus]) -> Points:
    """Positions to look anatomy up at, so that it is displaced away from each focus (mass effect)."""
    moved = points
    for focus in foci:
        pull = 0.45 * np.exp(-((_distance(points, focus) / (1.9 * focus.core_mm)) ** 2))
        moved = [m - pull * (p - c) for m, p, c in zip(moved, points, focus.centre_mm, strict=True)]
    return moved


def _fluid_distance(rng: Rng, points: Points, depth_XYZ: np.ndarray) -> np.ndarray:
    """Rough distance in mm to the fluid of surface, sulci (zero sheets of a noise) and midline fissure."""
    shape = depth_XYZ.shape
    sulci = 7.5 * np.abs(_noise(rng, shape, rng.uniform(5.5, 7.0))) + 0.9 * np.maximum(depth_XYZ - 21, 0)
    below_fissure = np.maximum(_ellipsoid_depth(points, (0, -4, 2), (60, 52, 27)), 0)
    midline = np.abs(points[0] + 1.2 * _noise(rng, shape, 35)) + below_fissure
    return np.minimum(np.minimum(sulci, depth_XYZ + 1.5), midline) + 0.6 * _noise(rng, shape, 26)


def _ventricle_depth(rng: Rng, points: Points) -> np.ndarray:
    x, y, z = points
    size = rng.uniform(0.8, 1.35)
    away = np.abs(x) - 0.004 * (y - 6) ** 2 * np.where(y < 6, 1.0, 0.6) - 7 * size
    lateral = _ellipsoid_depth([away, y, z - 0.08 * y], (0, -4, 9), (5.5 * size, 36 * size**0.5, 9.5 * size))
    third = _ellipsoid_depth(points, (0, -8, -3), (2.6 * size, 13, 9))
    return np.maximum(lateral, third) + 0.5 * _noise(rng, x.shape, 12)


def _tissue_maps(rng: Rng, points: Points, depth_XYZ: np.ndarray) -> Maps:
    """Fractions (X, Y, Z), summing to 1, of csf, grey and white, and the map of contrast-filled vessels."""
    x, y, z = points
    sided = [np.abs(x), y, z]
    fluid_mm = _fluid_distance(rng, points, depth_XYZ)
    csf = np.maximum(1 - _ramp(fluid_mm, 0.1, 1.7), _ramp(_ventricle_depth(rng, points), -0.6, 0.8))
    thalamus, putamen = ((12, -14, 2), (9, 13, 9)), ((25, 4, 2), (6, 18, 11))
    nuclei = 0.75 * _ramp(np.maximum(_ellipsoid_depth(sided, *thalamus), _ellipsoid_depth(sided, *putamen)), -1, 1.5)
    grey = np.maximum(1 - _ramp(fluid_mm, 3.4, 5.6), nuclei) * (1 - csf)
    sinus = _ramp(-np.hypot(x, 0.8 * (depth_XYZ - 3.5)), -4.0, -2.5) * (z > -12) * (y < 50)
    branch = _ramp(-np.maximum(11 * np.abs(_noise(rng, x.shape, 11)), fluid_mm), -2.2, -1.2)
    return {"csf": csf, "grey": grey, "white": 1 - csf - grey, "vessel": np.maximum(branch, sinus)}


def _grow_tumour(rng: Rng, points: Points, foci: list[_Focus], depth_XYZ: np.ndarray, tissue: Maps) -> np.ndarray:
    """Label map uint8 (X, Y, Z); adds the necrotic fraction to `tissue`."""
    shape = depth_XYZ.shape
    label_XYZ, tissue["necrosis"] = np.zeros(shape, np.uint8), np.zeros(shape, np.float32)
    bumps, fingers = _noise(rng, shape, 12), _noise(rng, shape, 8)
    # Oedema follows white matter and stops at cortex and fluid, which is what gives it fingers.
    reluctance = 5.0 * tissue["grey"] + 18.0 * tissue["csf"]
    for focus in foci:
        distance = _distance(points, focus) + 0.11 * focus.core_mm * bumps
        swollen = distance + 1.6 * fingers + reluctance < focus.core_mm + focus.edema_mm
        core = (distance < focus.core_mm) & (depth_XYZ > 1.5)
        inner_mm = focus.core_mm - focus.rim_mm * (1 + 0.22 * fingers) - distance
        label_XYZ[swollen & (label_XYZ == 0) & (depth_XYZ > 1.5) & (focus.edema_mm > 0)] = EDEMA
        label_XYZ[core & (label_XYZ < NON_ENHANCING)] = NON_ENHANCING
        if focus.rim_mm > 0:
            label_XYZ[core & (inner_mm < 0)] = ENHANCING
            tissue["necrosis"] = np.maximum(tissue["necrosis"], _ramp(inner_mm, 1.0, 5.0))
    return label_XYZ


def _acquire(rng: Rng, tissue: Maps, label_XYZ: np.ndarray, brain_XYZ: np.ndarray) -> np.ndarray:
    """Scanner image (X, Y, Z, 4) of the tissues: contrast, partial volume, bias field, Rician noise and gain."""
    shape = label_XYZ.shape
    texture = _noise(rng, shape, 6)
    image_XYZC = np.zeros((*shape, 4), np.float32)
    for channel, name in enumerate(CHANNELS):
        look = {part: np.float32(signal[channel] * rng.uniform(0.95, 1.05)) for part, signal in _SIGNAL.items()}
        signal = look["csf"] * tissue["csf"] + look["grey"] * tissue["grey"] + look["white"] * tissue["white"]
        if name == "t1gd":
            signal += tissue["vessel"] * (1.75 - signal)
        core = look["non_enhancing"] + tissue["necrosis"] * (look["necrosis"] - look["non_enhancing"])
        swelling = 0.25 * signal + 0.75 * look["edema"] * (1 + 0.07 * texture)
        signal = np.where(label_XYZ == EDEMA, swelling, signal)
        signal = np.where(label_XYZ == NON_ENHANCING, core * (1 + 0.07 * texture), signal)
        signal = np.where(label_XYZ == ENHANCING, look["enhancing"] * (1 + 0.12 * texture), signal)
        signal = ndimage.gaussian_filter(signal, 0.55, truncate=2.0)
        signal *= np.exp(0.05 * _noise(rng, shape, 100) + 0.02 * _noise(rng, shape, 11))
        real, imaginary = rng.uniform(0.015, 0.04) * rng.standard_normal((2, brain_XYZ.sum()), dtype=np.float32)
        magnitude = np.hypot(signal[brain_XYZ] + real, imaginary)
        gain = np.exp(rng.uniform(np.log(400), np.log(10000))) / magnitude.max()
        image_XYZC[brain_XYZ, channel] = np.maximum(gain * magnitude, 1)
    return image_XYZC


def _store(rng: Rng, image_XYZC: np.ndarray, label_XYZ: np.ndarray, axes_mm: np.ndarray) -> Phantom:
    origin_mm = np.round(rng.uniform(-30, 30, 3) - axes_mm @ ((np.array(label_XYZ.shape) - 1) / 2), 3)
    codes = str(rng.choice(list(_ORIENTATION_CHANCES), p=list(_ORIENTATION_CHANCES.values())))
    change = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(codes))
    image_XYZC, stored_XYZ = (orientations.apply_orientation(array, change) for array in (image_XYZC, label_XYZ))
    affine = affines.from_matvec(axes_mm, origin_mm) @ orientations.inv_ornt_aff(change, label_XYZ.shape)
    return Phantom(np.ascontiguousarray(image_XYZC), np.ascontiguousarray(stored_XYZ), affine)


def _write_case(folder: Path, seed: int, index: int, shape: Shape, spacing_mm: float) -> None:
    case = make_case(seed, index, shape=shape, spacing_mm=spacing_mm)
    for name, array in (("imagesTr", np.rint(case.image_XYZC).astype(np.int16)), ("labelsTr", case.label_XYZ)):
        nifti = nib.Nifti1Image(array, case.affine)
        nifti.set_qform(case.affine, code=1)
        nifti.header.set_xyzt_units("mm")
        content = gzip.compress(nifti.to_bytes(), compresslevel=1, mtime=0)
        with replacing(folder / name / f"PHANTOM_{index:03d}.nii.gz", flush=False) as part:
            part.write_bytes(content)


def _dataset_description(cases: int) -> dict:
    names = [f"PHANTOM_{index:03d}.nii.gz" for index in range(cases)]
    return {
        "name": "PHANTOM",
        "description": "Synthetic brain MRI with glioma-like lesions, made by medseg.phantom",
        "reference": "synthetic",
        "licence": "CC0 1.0",
        "release": "1.0",
        "tensorImageSize": "4D",
        "modality": {str(number): name for number, name in enumerate(CHANNELS)},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
        "numTraining": cases,
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": [],
    }
