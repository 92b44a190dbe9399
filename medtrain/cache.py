"""The HDF5 cache of volumes: write case by case, assemble, open, read a case or a patch, verify.

Legend of shapes: C channels, D H W voxels along the canonical axes.
"""

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from medtrain.errors import UserError
from medtrain.files import replacing

FORMAT = "medtrain-cache"
VERSION = 1
# Page-aligned data, so that a patch read touches no page of another case.
ALIGNMENT = 4096


@dataclass(frozen=True, kw_only=True)
class Case:
    """One prepared case: the network's input, its label, whatever else the task keeps, and JSON-able facts."""

    image_CDHW: np.ndarray
    label_DHW: np.ndarray
    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]


def checksum(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """BLAKE2b over names, shapes, types and bytes, 16 bytes as hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays, key=lambda item: item[0]):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def write_part(path: Path, case: Case, *, recipe: str, compressed: bool = False) -> None:
    """Write one case as a file of its own, atomically; `recipe` tells how it was prepared (see `part_fits`)."""
    arrays = {"image": case.image_CDHW, "label": case.label_DHW, **case.arrays}
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        for name, array in arrays.items():
            _create(file, name, array, compressed)
        file.attrs["facts"] = json.dumps(case.facts)
        file.attrs["checksum"] = checksum(arrays.items())
        file.attrs["recipe"] = recipe


def part_fits(path: Path, recipe: str) -> bool:
    """Whether a case file from an earlier run is whole and was prepared in the same way."""
    try:
        with h5py.File(path) as file:
            return bool(file.attrs["recipe"] == recipe)
    except (OSError, KeyError):
        return False


def _create(group: Any, name: str, array: np.ndarray, compressed: bool) -> None:
    """Contiguous by default so that it can be memory-mapped; labels at native spacing are small when compressed."""
    pays = compressed or name.endswith("_native")
    if pays and array.size:
        chunks = tuple(min(n, 64) for n in array.shape)
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
) -> None:
    """Join (case id, case file) pairs into one cache as they come, atomically; memory stays at one case.

    The parts are left in place. What the iterable raises leaves no cache.
    """
    with (
        replacing(out) as temporary,
        h5py.File(temporary, "w", libver="v110", alignment_threshold=ALIGNMENT, alignment_interval=ALIGNMENT) as file,
    ):
        file.attrs["format"] = FORMAT
        file.attrs["version"] = VERSION
        file.attrs["kind"] = "volume"
        file.attrs["channels"] = json.dumps(list(channels))
        file.attrs["labels"] = json.dumps(dict(labels))
        file.attrs["spacing_mm"] = spacing_mm
        file.attrs["preparation"] = json.dumps(dict(preparation))
        cases = file.create_group("cases")
        for name, part in parts:
            with h5py.File(part) as source:
                group = cases.create_group(name)
                for key in source:
                    source.copy(key, group)
                for key in ("facts", "checksum", "recipe"):
                    group.attrs[key] = source.attrs[key]


class Cache:
    """An opened cache; read-only, safe to open in any number of processes. Errors are UserErrors naming the file.

    Contiguous arrays are read through one memory map of the file, so processes share the page cache and hold no
    copy; compressed ones go through h5py.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.file = open_file(self.path, "volume")
        self.channels: list[str] = json.loads(self.file.attrs["channels"])
        self.labels: dict[str, Any] = json.loads(self.file.attrs["labels"])
        self.spacing_mm = float(self.file.attrs["spacing_mm"])
        self.preparation: dict[str, Any] = json.loads(self.file.attrs["preparation"])
        self.ids: list[str] = sorted(self.file["cases"])
        self._views: dict[tuple[str, str], Any] = {}
        with open(self.path, "rb") as raw:
            self._map = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def fingerprint(self) -> str:
        """A hash of every case's name and checksum: tells whether two caches hold the same data."""
        pairs = [(case, str(self._group(case).attrs["checksum"])) for case in self.ids]
        return hashlib.blake2b(json.dumps([self.labels, pairs], sort_keys=True).encode(), digest_size=8).hexdigest()

    def array(self, case: str, name: str) -> Any:
        """An array of a case without reading it: a view of the memory map, or an h5py dataset if compressed."""
        key = (case, name)
        if key not in self._views:
            dataset = self._group(case)[name]
            offset = dataset.id.get_offset()
            if offset is None or dataset.size == 0:
                self._views[key] = dataset
            else:
                self._views[key] = np.frombuffer(self._map, dataset.dtype, count=dataset.size, offset=offset).reshape(
                    dataset.shape
                )
        return self._views[key]

    def has(self, case: str, name: str) -> bool:
        """Whether the case holds an array of that name."""
        return name in self._group(case)

    def facts(self, case: str) -> dict[str, Any]:
        """The JSON facts stored with a case."""
        return json.loads(self._group(case).attrs["facts"])

    def read(self, case: str, name: str) -> np.ndarray:
        """A whole array of a case, as a copy in memory."""
        return np.array(self.array(case, name)[...])

    def patch(self, case: str, name: str, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """The box [start, stop) of the last three axes, as a contiguous copy; the box must lie in the volume."""
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        source = self.array(case, name)
        return np.ascontiguousarray(source[(..., *box)])

    def verify(self) -> Iterator[tuple[str, bool]]:
        """Yield (case, whether its bytes are those that were written)."""
        for case in self.ids:
            group = self._group(case)
            try:
                found = checksum((name, group[name][...]) for name in group)
            except OSError:
                found = "unreadable"
            yield case, found == group.attrs["checksum"]

    def _group(self, case: str) -> Any:
        try:
            return self.file["cases"][case]
        except KeyError:
            raise UserError(f"{self.path} has no case {case!r}: prepare it again from the right data set.") from None

    def close(self) -> None:
        """Close the file; the memory map ends with its last view."""
        self._views.clear()
        self.file.close()


def kind_of(path: Path) -> str:
    """`volume` or `image`; raises UserError where the file is no cache."""
    with open_file(path) as file:
        return str(file.attrs["kind"])


def open_file(path: Path, kind: str | None = None) -> Any:
    """The HDF5 file of a cache of that kind, read-only; raises UserError."""
    remedy = "make it with `python launch/prepare.py`."
    if not path.is_file():
        raise UserError(f"{path} is not there: {remedy}")
    try:
        # no lock: it fails on read-only and some network file systems, and a whole cache is never written to
        file = h5py.File(path, "r", locking=False)
    except OSError:
        raise UserError(f"{path} is not an HDF5 file or is cut short: {remedy}") from None
    if file.attrs.get("format") != FORMAT:
        raise UserError(f"{path} is an HDF5 file of another program: {remedy}")
    found = str(file.attrs.get("kind"))
    if file.attrs.get("version") != VERSION or found not in ("volume", "image"):
        words = f"version {file.attrs.get('version')}, kind {found}"
        raise UserError(f"{path} is a cache of {words}, this program reads version {VERSION}: {remedy}")
    if kind not in (None, found):
        raise UserError(f"{path} is a cache of {found}s, this recipe needs one of {kind}s: name the other one.")
    return file
