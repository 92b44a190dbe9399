"""From scans to the cache: canonical orientation, brain crop, resampling, z-score; several processes, resumable.

Legend of shapes: C channels, X Y Z the file's voxel axes, D H W canonical axes.
"""

import hashlib
import itertools
import json
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medseg.cache import Cache, Case, assemble, part_fits, write_part
from medseg.cases import CHANNELS, CaseFiles
from medseg.geometry import (
    Grid,
    bounding_box,
    orientation,
    resample_image,
    resample_label,
    resampled_size,
    to_canonical,
)
from medseg.labels import LabelMap
from medseg.msd import Dataset, read_dataset
from medseg.nifti import MOST_VOXELS, Unreadable
from medseg.scan import Scan, read_scan
from medtrain.aside import Aside, listing_of, report
from medtrain.errors import UserError
from medtrain.paths import origin, spelt
from medtrain.patients import NAME as PATIENTS
from medtrain.patients import read_patients
from medtrain.preparing import existing, make_once, parts_of, refuse_other, say_outdated
from medtrain.processes import in_processes
from medtrain.progress import Progress
from medtrain.recipe import NO_EFFECT, within

# Tumour voxels kept per class, from which foreground-biased crops are drawn.
VOXELS_KEPT = 2000
# Nothing is resampled finer: no scanner sees it, and no memory holds it.
LEAST_MM = 0.1
# How far voxels may lie beyond those of the training scans, as a share of these, before a network sees another picture.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Preparation:
    """How scans become cases; stored with the cache, so that prediction prepares in the same way.

    `spacing_mm` 0 keeps each scan's own spacing. The sizes (D, H, W) in mm belong to trained members, whose training
    scans have them: a scan whose voxels are clearly smaller than `least_mm` or larger than `most_mm` is resampled to
    the median, `voxel_mm`. Raise `version` whenever the arithmetic changes.
    """

    spacing_mm: float = within(0.0, 0, below=100)
    compressed: bool = False
    version: int = 1
    voxel_mm: tuple[float, float, float] | None = within(None, 1e-3, most=1e3, **NO_EFFECT)
    least_mm: tuple[float, float, float] | None = within(None, 1e-3, most=1e3, **NO_EFFECT)
    most_mm: tuple[float, float, float] | None = within(None, 1e-3, most=1e3, **NO_EFFECT)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values; what is not known is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def target_mm(self, voxel_mm: Sequence[float]) -> tuple[float, float, float] | None:
        """The voxel size (D, H, W) that a scan of `voxel_mm` is resampled to; None where it stays as it is."""
        if self.spacing_mm:
            return (self.spacing_mm,) * 3
        if not self.voxel_mm:
            return None
        known = zip(voxel_mm, self.least_mm or self.voxel_mm, self.most_mm or self.voxel_mm, strict=True)
        return self.voxel_mm if any(beyond(mm, least, most) for mm, least, most in known) else None


def beyond(mm: float, least: float, most: float) -> bool:
    """Whether a size lies clearly, by more than TOLERANCE, below `least` or above `most`."""
    return mm < (1 - TOLERANCE - 1e-6) * least or mm > (1 + TOLERANCE + 1e-6) * most


def in_words(voxel_mm: Sequence[float]) -> str:
    """A voxel size as 0.5 x 0.5 x 5 mm."""
    return " x ".join(f"{mm:.3g}" for mm in voxel_mm) + " mm"


def prepare_case(case_id: str, scan: Scan, label_map: LabelMap, how: Preparation) -> Case:
    """One scan as a case of the cache: image float16, z-scored over the brain, zero outside it."""
    flips_axes = orientation(scan.affine)
    image = np.stack([to_canonical(volume, flips_axes) for volume in scan.image_CXYZ])
    label = None if scan.label_XYZ is None else to_canonical(scan.label_XYZ, flips_axes)
    brain = (image != 0).any(axis=0)
    start, stop = bounding_box(brain if label is None else brain | (label > 0))
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    image, brain = image[(slice(None), *box)], brain[box]
    native = np.zeros(brain.shape, np.uint8) if label is None else np.ascontiguousarray(label[box])
    image = zscore(image, brain)
    odd = None if label is None else enhancement(image, native, label_map)
    voxel_mm = np.abs(nib.affines.voxel_sizes(scan.affine))[np.argsort(flips_axes[:, 0])]
    target_mm = how.target_mm(voxel_mm)
    size = resampled_size(native.shape, voxel_mm, target_mm) if target_mm else native.shape
    if image.shape[0] * math.prod(size) > MOST_VOXELS:
        raise UserError(
            f"case {case_id} would have {math.prod(size):,} voxels of {in_words(target_mm or voxel_mm)}: correct its "
            "header's voxel size, or give a coarser --spacing-mm."
        )
    arrays: dict[str, np.ndarray] = {}
    small = native
    if tuple(size) != native.shape:
        image, small = resample_image(image, size), resample_label(native, size)
        arrays["label_native"] = native
    rng = np.random.default_rng(zlib.crc32(case_id.encode()))
    for code in (label_map.edema, label_map.core, label_map.enhancing):
        voxels = np.argwhere(small == code).astype(np.int16)
        if len(voxels) > VOXELS_KEPT:
            voxels = voxels[np.sort(rng.choice(len(voxels), VOXELS_KEPT, replace=False))]
        arrays[f"voxels_{code}"] = voxels
    grid = Grid(
        shape_XYZ=tuple(scan.image_CXYZ.shape[1:]),
        affine=tuple(map(tuple, scan.affine.tolist())),
        flips_axes=tuple(map(tuple, flips_axes.tolist())),
        start=tuple(start),  # type: ignore[arg-type]
        stop=tuple(stop),  # type: ignore[arg-type]
        size=tuple(map(int, size)),  # type: ignore[arg-type]
        header=scan.header.hex(),
    )
    facts = {"grid": grid.to_dict(), "voxel_mm": voxel_mm.tolist(), "t1gd_contrast": odd,
             "brain_share": round(float(brain.mean()), 3)}  # fmt: skip
    return Case(image_CDHW=image.astype(np.float16), label_DHW=small, arrays=arrays, facts=facts)


def zscore(image_CDHW: np.ndarray, brain_DHW: np.ndarray) -> np.ndarray:
    """Per channel (x - mean) / standard deviation over the brain voxels; zero outside the brain."""
    out = np.zeros(image_CDHW.shape, np.float32)
    for channel, volume in enumerate(image_CDHW):
        values = volume[brain_DHW]
        spread = float(values.std(dtype=np.float64))
        out[channel][brain_DHW] = (values - values.mean(dtype=np.float64)) / (spread or 1.0)
    return np.clip(out, -60000, 60000)  # float16 ends at 65504


def enhancement(image_CDHW: np.ndarray, label_DHW: np.ndarray, label_map: LabelMap) -> float | None:
    """Mean T1Gd of the enhancing tumour less that of the non-enhancing core; None where one of them is missing."""
    t1gd = image_CDHW[CHANNELS.index("T1Gd")]
    means = [t1gd[label_DHW == code] for code in (label_map.enhancing, label_map.core)]
    if not all(values.size for values in means):
        return None
    return float(means[0].mean() - means[1].mean())


def prepare_dataset(folder: Path, out: Path, how: Preparation, *, workers: int = 1, label_map: str = "auto",
                    strict: bool = False, settled: bool = False) -> Path:  # fmt: skip
    """Make the cache `out` from a data folder; a second call goes on where the first ended.

    Cases that can not be used are set aside: named on stderr and in `<out>.set_aside.csv`, and tried again by the next
    call; or, if `strict`, a UserError. Finished cases wait in `<out>.parts` until all are there, then `out` appears
    whole. A `settled` cache, on which members have been trained, takes no case up that it did not have. Raises
    UserError, as where no case can be used; what was prepared before stays.
    """
    dataset = read_dataset(folder, label_map)
    work = _Work(dataset, out, how, workers, strict, settled)
    return make_once(out, lambda: _holds(work), lambda: _make(work))


class _Work:
    """What one call of `prepare_dataset` has to do, and the cases that it has set aside so far."""

    def __init__(self, dataset: Dataset, out: Path, how: Preparation, workers: int, strict: bool, settled: bool):
        self.dataset, self.out, self.how, self.workers = dataset, out, how, workers
        self.strict, self.settled = strict, settled
        self.parts = parts_of(out)
        self.listing = listing_of(out)
        self.cases = {case.id: case for case in dataset.cases}
        self.recipes = {case.id: _recipe(case, dataset.label_map, how) for case in dataset.cases}
        self.patients = read_patients(dataset.folder, set(self.cases), "case")
        self.aside: list[Aside] = []

    def part(self, name: str) -> Path:
        """Where a case waits for the others."""
        return self.parts / f"{name}.h5"


def _make(work: _Work) -> None:
    """Prepare what `out` lacks and put it together with what it holds; leaves it alone where nothing is new."""
    found, patients = _recipes_in(work.out)
    held = sorted(name for name, recipe in found.items() if work.recipes.get(name) == recipe)
    if len(held) < len(found):
        say_outdated(work.out)
    fresh = _prepared(work, sorted(set(work.recipes) - set(held)))
    first = list(itertools.islice(fresh, 1))
    if not first and not held:
        reasons = [reason for _, reason in sorted(work.aside)]
        many = f"no case of {spelt(work.dataset.folder)} can be used; the first of {len(reasons)}: "
        raise UserError(f"{many if len(reasons) > 1 else ''}{reasons[0]}")
    if first or len(held) < len(found) or patients != work.patients:
        assemble(
            work.out,
            itertools.chain(first, fresh, _intact(work.out, held)),
            channels=CHANNELS,
            labels=work.dataset.label_map.to_dict(),
            spacing_mm=work.how.spacing_mm,
            preparation=work.how.to_dict(),
            origin=origin(work.dataset.folder),
            patients=work.patients,
        )
    if work.patients:
        print(f"{len(set(work.patients.values()))} patients are told by {PATIENTS}: no split cuts one", flush=True)
    _report_aside(work)


def _report_aside(work: _Work) -> None:
    report(sorted(work.aside), work.listing, "case", root=work.dataset.folder)
    if len(work.aside) > len(work.recipes) / 2:
        print("WARNING: most cases are set aside: look at their reasons, and at --label-map", file=sys.stderr)


def _intact(cache: Path, names: list[str]) -> Iterator[tuple[str, Path]]:
    """Cases of a cache, to be taken over into the one that replaces it."""
    if not names:
        return
    opened = Cache(cache)
    try:
        for name in names:
            if not opened.intact(name):
                raise UserError(f"{cache}: the bytes of case {name} have changed: remove it and prepare it again.")
            yield name, cache
    finally:
        opened.close()


def _prepared(work: _Work, names: list[str]) -> Iterator[tuple[str, Path]]:
    """Yield every case's file: those that are there, then the others as they are prepared, in several processes."""
    todo = [work.cases[name] for name in names if not part_fits(work.part(name), work.recipes[name])]
    if len(todo) < len(work.cases):
        print(f"{len(work.cases) - len(todo)} of {len(work.cases)} cases are prepared already", flush=True)
    missing = {case.id for case in todo}
    yield from ((name, work.part(name)) for name in names if name not in missing)
    jobs = [(case, work.parts, work.dataset.label_map, work.how, work.strict) for case in todo]
    with Progress(len(todo), "prepare") as progress:
        for name, reason in in_processes(
            _prepare_part, jobs, work.workers, what=f"prepared {spelt(work.dataset.folder)}"
        ):
            if reason:
                work.aside.append((name, reason))
            else:
                yield name, work.part(name)
            progress.advance(name)


def _prepare_part(job: tuple[CaseFiles, Path, LabelMap, Preparation, bool]) -> Aside:
    """Write a case's file; returns its name and why it is set aside, or no words."""
    files, parts, label_map, how, strict = job
    try:
        case = prepare_case(files.id, read_scan(files, label_map), label_map, how)
    except Unreadable:  # not the case's fault, so it is no reason to train without it
        raise
    except UserError as error:
        if strict:
            raise
        return files.id, str(error)
    write_part(parts / f"{files.id}.h5", case, recipe=_recipe(files, label_map, how), compressed=how.compressed)
    return files.id, ""


def _recipe(files: CaseFiles, label_map: LabelMap, how: Preparation) -> str:
    """Names how a case was prepared and from which files (size and time), so that a changed one is made anew."""
    paths = [path for path in (*files.images, files.label) if path is not None]
    stats: list[Any] = []
    for path in paths:
        try:
            stats.append([path.name, path.stat().st_size, path.stat().st_mtime_ns])
        except OSError:
            raise UserError(f"{spelt(path)} is not there: restore it or take the case out.") from None
    text = json.dumps([how.to_dict(), label_map.to_dict(), stats], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _recipes_in(out: Path) -> tuple[dict[str, str], dict[str, int]]:
    """How each case of the cache `out` was prepared, and whose it is; nothing without a cache. Raises UserError."""
    if not out.exists():
        return {}, {}
    cache = Cache(out)
    try:
        return {case: str(cache.fact(case, "recipe")) for case in cache.ids}, cache.patients
    finally:
        cache.close()


def _holds(work: _Work) -> bool:
    """Whether `out` is there and up to date; raises UserError where it is something else than an older state of it."""
    out = work.out
    cache = existing(out, Cache)
    if cache is None:
        return False
    made_from = cache.origin
    cache.close()
    found, patients = _recipes_in(out)
    if found == work.recipes and patients == work.patients:
        print(f"{out} already holds these {len(found)} cases", flush=True)
        report([], work.listing, "case", root=work.dataset.folder)
        return True
    part = bool(found) and found.items() <= work.recipes.items()  # others were set aside, or are new
    if part and work.settled and patients == work.patients:
        left = len(work.recipes) - len(found)
        print(f"note: {left} cases that were set aside, or are new, stay out of {out}: members have been trained "
              "without them. Give another --out to take them up.", flush=True)  # fmt: skip
        return True
    if (
        made_from != origin(work.dataset.folder)
        and not part
        and not (made_from == "" and set(found) == set(work.recipes))
    ):
        refuse_other(out, work.dataset.folder)
    return False
