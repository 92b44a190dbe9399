"""The HDF5 cache of volumes: write case by case, assemble, open, read a case or a patch, verify.

Legend of shapes: C channels, D H W voxels along the canonical axes.
"""

import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg.cases import CHANNELS
from medseg.geometry import Grid
from medseg.labels import LabelMap
from medtrain import hdf5
from medtrain.cache import FORMAT, VERSION, checksum, open_file
from medtrain.errors import UserError
from medtrain.files import replacing
from medtrain.wording import plain, shown

# Page-aligned data, so that a patch read touches no page of another case.
ALIGNMENT = 4096
# Type and axes of a case's arrays by the beginning of their names; its attributes.
ARRAYS = {"image": ("f2", 4), "label": ("u1", 3), "voxels_": ("i2", 2)}
ATTRIBUTES = ("facts", "checksum", "recipe")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One prepared case: the network's input, its label, whatever else the task keeps, and JSON-able facts."""

    image_CDHW: np.ndarray
    label_DHW: np.ndarray
    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]


def write_part(path: Path, case: Case, *, recipe: str, compressed: bool = False) -> None:
    """Write one case as a file of its own, atomically; `recipe` tells how it was prepared (see `part_fits`)."""
    arrays = {"image": case.image_CDHW, "label": case.label_DHW, **case.arrays}
    with replacing(path) as temporary, hdf5.file(temporary, "w", libver="v110") as file:
        for name, array in arrays.items():
            _create(file, name, array, compressed)
        file.attrs["facts"] = hdf5.text(json.dumps(case.facts))
        file.attrs["checksum"] = hdf5.text(checksum(arrays.items()))
        file.attrs["recipe"] = hdf5.text(recipe)


def part_fits(path: Path, recipe: str) -> bool:
    """Whether a case file from an earlier run is whole, leads to no other file, and was prepared in the same way."""
    try:
        with hdf5.file(path) as file:
            return bool(hdf5.attribute(_case_in(file, "", path), "recipe") == recipe)
    except (UserError, *hdf5.FAULTS):
        return False


def _case_in(file: Any, name: str, path: Path) -> Any:
    """The group of a case, in an opened file of its own or in a cache; UserError where it is not as `write_part` leaves
    it, or leads to another file.
    """
    try:
        # by the names alone: to ask for one would follow a link
        group = hdf5.group(hdf5.group(file, "cases"), name) if "cases" in list(file) else file
        size = path.stat().st_size
        for key in group:
            _stored(group, key, size)
        for key in ATTRIBUTES:
            hdf5.attribute(group, key)
    except hdf5.FAULTS as error:
        if fault := hdf5.system_fault(error):
            raise UserError(f"{path} can not be read ({fault}): see to it, and run this again.") from None
        raise UserError(f"{path} is damaged ({shown(error, 80)}): remove it, and prepare again.") from None
    return group


def _stored(group: Any, name: str, size: int) -> Any:
    """An array of a case, not read yet, in a file of `size` bytes; raises KeyError, ValueError."""
    kind, axes = next((value for key, value in ARRAYS.items() if name.startswith(key)), ("", 0))
    return hdf5.dataset(group, name, kind, axes, size)


def _create(group: Any, name: str, array: np.ndarray, compressed: bool) -> None:
    """Contiguous by default so that it can be memory-mapped; labels at native spacing are small when compressed."""
    pays = compressed or name.endswith("_native")
    if pays and array.size:
        chunks = tuple(min(n, hdf5.SIDE) for n in array.shape)
        group.create_dataset(name, data=array, chunks=chunks, compression="gzip", compression_opts=1, shuffle=True)
    else:
        group.create_dataset(name, data=array)


def assemble(
    out: Path,
    parts: Iterable[tuple[str, Path]],
    *,
    channels: Sequence[str],
    labels: Mapping[str, Any],
    spacing_mm: float,
    preparation: Mapping[str, Any],
    origin: str = "",
    patients: Mapping[str, int] | None = None,
) -> None:
    """Join (case id, case file) pairs into one cache as they come, atomically; memory stays at one case.

    A case's file may be another cache that holds the case, as that which is replaced. `origin` tells from which folder
    (see `paths.origin`), `patients` whose the cases are, by numbers. The parts are left in place. What the iterable
    raises leaves no cache. Raises UserError where a part is damaged or leads to another file.
    """
    with (
        replacing(out) as temporary,
        hdf5.file(temporary, "w", libver="v110", alignment_threshold=ALIGNMENT, alignment_interval=ALIGNMENT) as file,
    ):
        file.attrs["version"] = VERSION
        file.attrs["kind"] = hdf5.text("volume")
        file.attrs["channels"] = hdf5.text(json.dumps(list(channels)))
        file.attrs["labels"] = hdf5.text(json.dumps(dict(labels)))
        file.attrs["spacing_mm"] = spacing_mm
        file.attrs["preparation"] = hdf5.text(json.dumps(dict(preparation)))
        file.attrs["origin"] = hdf5.text(origin)
        file["patients"] = np.frombuffer(json.dumps(dict(patients or {})).encode(), np.uint8)  # no attribute is so long
        cases = file.create_group("cases")
        for name, part in parts:
            with hdf5.file(part) as whole:  # as `Cache` opens it, maybe at the same time
                source = _case_in(whole, name, part)
                group = cases.create_group(name)
                for key in source:
                    source.copy(key, group)
                for key in ATTRIBUTES:
                    group.attrs[key] = source.attrs[key]
        file.attrs["format"] = hdf5.text(FORMAT)  # last: without it the file is no cache


class Cache:
    """An opened cache; read-only, safe to open in any number of processes. Errors are UserErrors naming the file.

    Contiguous arrays are read through one memory map of the file, so processes share the page cache and hold no
    copy; compressed ones go through h5py. With `verify`, a case's bytes are compared with its checksum before any of
    them is used.
    """

    def __init__(self, path: Path | str, verify: bool = False):
        self.path = Path(path)
        self.file = open_file(self.path, "volume")
        try:
            self._read_facts()
        except hdf5.FAULTS as error:
            self.file.close()
            if fault := hdf5.system_fault(error):
                raise UserError(f"{self.path} can not be read ({fault}): see to it, and run this again.") from None
            raise UserError(f"{self.path} is damaged ({shown(error, 80)}): prepare it again.") from None
        self.verifying = verify
        self._verified: set[str] = set()
        self._views: dict[tuple[str, str], Any] = {}

    def _read_facts(self) -> None:
        about = {name: hdf5.attribute(self.file, name) for name in ("channels", "labels", "preparation")}
        self.channels: list[str] = json.loads(about["channels"])
        self.labels: dict[str, Any] = json.loads(about["labels"])
        self.preparation: dict[str, Any] = json.loads(about["preparation"])
        self.spacing_mm = float(hdf5.attribute(self.file, "spacing_mm"))
        self.origin = str(hdf5.attribute(self.file, "origin"))
        kinds = ((self.channels, list), (self.labels, dict), (self.preparation, dict))
        if not all(isinstance(value, kind) for value, kind in kinds) or not 0 <= self.spacing_mm < math.inf:
            raise ValueError("its attributes are of another type")
        self._cases = hdf5.group(self.file, "cases")
        self.ids: list[str] = sorted(self._cases)
        if not all(map(plain, self.ids)):
            raise ValueError("the name of a case can not be printed")
        with open(self.path, "rb") as raw:
            self._map = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
        told = {}
        if "patients" in self.file:  # older caches have none
            stored = hdf5.dataset(self.file, "patients", "u1", 1, len(self._map), plain=True)
            told = json.loads(stored[()].tobytes())
        self.patients: dict[str, int] = {str(case): int(number) for case, number in told.items()}

    @property
    def fingerprint(self) -> str:
        """A hash of every case's name and checksum: tells whether two caches hold the same data."""
        pairs = [(case, str(self.fact(case, "checksum"))) for case in self.ids]
        about = [self.labels, pairs, *([self.patients] if self.patients else [])]
        return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()

    def array(self, case: str, name: str) -> Any:
        """An array of a case without reading it: a view of the memory map, or an h5py dataset if compressed."""
        key = (case, name)
        if key not in self._views:
            if self.verifying and case not in self._verified:
                self._verified.add(case)  # before, as the comparison reads arrays itself
                if not self.intact(case):
                    self._verified.discard(case)
                    raise UserError(f"{self.path}: the bytes of case {case} have changed: prepare it again.")
            with self._reading(case):
                self._views[key] = self._view(case, name)
        return self._views[key]

    def _view(self, case: str, name: str) -> Any:
        dataset = _stored(self._group(case), name, len(self._map))
        offset = dataset.id.get_offset()
        view: Any = dataset
        if offset is not None and dataset.size:
            view = np.frombuffer(self._map, dataset.dtype, count=dataset.size, offset=offset).reshape(dataset.shape)
        if name == "image" and view.shape[0] != len(self.channels):
            raise ValueError(f"{view.shape[0]} channels")
        if name == "label" and view.shape != self.array(case, "image").shape[1:]:
            raise ValueError(f"label has shape {view.shape}, unlike the image")
        if name.startswith("voxels_") and view.size:
            voxels = view[...]
            if voxels.shape[1] != 3 or voxels.min() < 0 or (voxels.max(0) >= self.array(case, "image").shape[1:]).any():
                raise ValueError(f"{name} lie outside of the image")
        return view

    def has(self, case: str, name: str) -> bool:
        """Whether the case holds an array of that name."""
        return name in self._group(case)

    def facts(self, case: str) -> dict[str, Any]:
        """The JSON facts stored with a case."""
        with self._reading(case):
            return dict(json.loads(self.fact(case, "facts")))

    def read(self, case: str, name: str) -> np.ndarray:
        """A whole array of a case, as a copy in memory."""
        source = self.array(case, name)
        with self._reading(case):
            return np.array(source[...])

    def patch(self, case: str, name: str, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """The box [start, stop) of the last three axes, as a contiguous copy; zero where it leaves the volume."""
        source = self.array(case, name)
        sides = source.shape[-3:]
        low = [min(max(a, 0), n) for a, n in zip(start, sides, strict=True)]
        high = [min(max(b, 0), n) for b, n in zip(stop, sides, strict=True)]
        with self._reading(case):
            inside = np.ascontiguousarray(source[(..., *map(slice, low, high))])
        if low == list(start) and high == list(stop):
            return inside
        out: Any = np.zeros((*source.shape[:-3], *(b - a for a, b in zip(start, stop, strict=True))), source.dtype)
        if inside.size:
            there = tuple(slice(a - first, b - first) for first, a, b in zip(start, low, high, strict=True))
            out[(..., *there)] = inside
        return out

    def verify(self) -> Iterator[tuple[str, bool]]:
        """Yield (case, whether its bytes are those that were written)."""
        for case in self.ids:
            yield case, self.intact(case)

    def intact(self, case: str) -> bool:
        """Whether a case's bytes are those that were written; raises UserError where the system can not read them."""
        try:
            group = self._group(case)
            views = ((name, self._view(case, name)) for name in group)
            return bool(checksum((name, view[...]) for name, view in views) == hdf5.attribute(group, "checksum"))
        except (UserError, *hdf5.FAULTS) as error:
            if fault := hdf5.system_fault(error):
                raise UserError(f"{self.path}: case {case} can not be read ({fault}): run this again.") from None
            return False

    def fact(self, case: str, name: str) -> Any:
        """One attribute of a case, as it is stored."""
        group = self._group(case)
        with self._reading(case):
            return hdf5.attribute(group, name)

    def _group(self, case: str) -> Any:
        if case not in self._cases:
            raise UserError(f"{self.path} has no case {case!r}: prepare it again from the right data set.")
        with self._reading(case):
            return hdf5.group(self._cases, case)

    @contextmanager
    def _reading(self, case: str) -> Iterator[None]:
        """Whatever damaged bytes make the library stumble over is told as damage of the case."""
        try:
            yield
        except hdf5.FAULTS as error:
            if fault := hdf5.system_fault(error):
                raise UserError(f"{self.path}: case {case} can not be read ({fault}): run this again.") from None
            words = shown(error, 80)
            raise UserError(f"{self.path}: case {case} is damaged ({words}): prepare it again.") from None

    def close(self) -> None:
        """Close the file; the memory map ends with its last view."""
        self._views.clear()
        self.file.close()


def read_label_map(cache: Cache) -> LabelMap:
    """What a cache's labels mean; raises UserError where it does not tell, or has other channels than ours."""
    try:
        label_map = LabelMap.from_dict(cache.labels)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{cache.path} does not tell what its labels mean: prepare it again.") from None
    if len(cache.channels) != len(CHANNELS):
        raise UserError(
            f"{cache.path} has {len(cache.channels)} channels, {len(CHANNELS)} are needed: prepare it again."
        )
    return label_map


def read_grid(cache: Cache, case: str) -> Grid:
    """The way back to a case's own grid; raises UserError where it does not lead there."""
    facts = cache.facts(case)
    try:
        grid = Grid.from_dict(facts["grid"])
        fits = grid.native == cache.array(case, reference_name(cache, case)).shape
        fits = fits and all(0 < mm < math.inf for mm in grid.voxel_mm)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise UserError(f"{cache.path}: case {case} is damaged (its grid): prepare it again.")
    return grid


def reference_name(cache: Cache, case: str) -> str:
    """Which array holds the true label in the crop box at the scan's own spacing."""
    return "label_native" if cache.has(case, "label_native") else "label"
