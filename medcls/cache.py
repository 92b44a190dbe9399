"""The HDF5 cache of images: encoded bytes as they are, one after the other in one dataset, with their facts in columns.

N images, K classes, F numbers of a histogram.
"""

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medtrain import hdf5
from medtrain.cache import FORMAT, VERSION, checksum, open_file
from medtrain.errors import UserError
from medtrain.files import replacing
from medtrain.wording import plain, shown

COLUMNS = ("target", "size", "checksum", "histogram")
# Type and axes of what is stored.
COLUMN_TYPES = {
    "path": ("S", 1), "target": ("i4", 1), "group": ("i4", 1), "near": ("i4", 1), "size": ("i4", 2),
    "offsets": ("i8", 1), "checksum": ("u1", 2), "histogram": ("f4", 2), "facts": ("u1", 1),
}  # fmt: skip
LONGEST = 4096  # that of `medcls.images`, which imports this
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
# ITU-T T.81, table B.1: what tells the size, and what may stand before it
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
BEFORE = {0xC4, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}


@dataclass(frozen=True)
class Images:
    """Some images in a row: encoded bytes, and columns of the same length: path, target (N,) int32 class, size (N,2)
    int32 height and width, checksum (N,16) uint8 (BLAKE2b of the bytes), histogram (N,F) float32.
    """

    encoded: Sequence[bytes]
    paths: Sequence[str]
    columns: Mapping[str, np.ndarray]


def digest(encoded: Any) -> bytes:
    """BLAKE2b of an image's bytes, 16 bytes."""
    return hashlib.blake2b(encoded, digest_size=16).digest()


def told_size(encoded: np.ndarray) -> tuple[int, int]:
    """Height and width that a PNG's or JPEG's head tells; raises ValueError for bytes that begin otherwise."""
    head = bytes(encoded[:24])
    if head.startswith(PNG) and len(head) == 24:
        return int.from_bytes(head[20:]), int.from_bytes(head[16:20])
    at = 2 if head.startswith(b"\xff\xd8") else encoded.size
    # no stray or fill bytes, which decoders pass over each in its way: the size must be the one that they find
    while len(segment := bytes(encoded[at : at + 9])) == 9 and segment[0] == 0xFF:
        if segment[1] in FRAMES:
            return int.from_bytes(segment[5:7]), int.from_bytes(segment[7:9])
        length = int.from_bytes(segment[2:4])
        if segment[1] not in BEFORE or length < 2:
            break
        at += 2 + length
    raise ValueError("no PNG and no JPEG")


def write_images(out: Path, parts: Iterable[Images], *, size: int, groups: np.ndarray, near: np.ndarray | None = None,
                 classes: Sequence[tuple[str, str]], facts: Mapping[str, Any],
                 preparation: Mapping[str, Any], origin: str = "") -> None:  # fmt: skip
    """Join parts of `size` bytes together into one cache, atomically, holding one part at a time.

    `groups` (N,) are those that no split cuts, `near` (N,) those of near-duplicates, the same where it is None; `facts`
    are JSON-able (what was set aside, and why); `origin` tells from which folder (see `paths.origin`).
    """
    with replacing(out) as temporary, hdf5.file(temporary, "w", libver="v110") as file:
        file.attrs.update({"version": VERSION, "kind": hdf5.text("image"), "origin": hdf5.text(origin)})
        file.attrs["classes"] = hdf5.text(json.dumps([list(pair) for pair in classes]))
        file.attrs["preparation"] = hdf5.text(json.dumps(dict(preparation)))
        ends: list[int] = [0]
        paths: list[bytes] = []
        columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        whole = file.create_dataset("bytes", (size,), np.uint8)  # contiguous, so it can be memory-mapped
        for part in parts:
            joined = np.frombuffer(b"".join(part.encoded), np.uint8)
            whole[ends[-1] : ends[-1] + joined.size] = joined
            for content in part.encoded:
                ends.append(ends[-1] + len(content))
            paths += [path.encode() for path in part.paths]
            for name, column in columns.items():
                column.append(part.columns[name])
        file["offsets"] = np.array(ends, np.int64)
        file["path"] = np.array(paths)
        file["group"] = groups.astype(np.int32)
        file["near"] = (groups if near is None else near).astype(np.int32)
        for name, column in columns.items():
            file[name] = np.concatenate(column)
        file["facts"] = np.frombuffer(json.dumps(dict(facts)).encode(), np.uint8)
        sums = {name: checksum([(name, file[name][()])]) for name in COLUMN_TYPES}
        file.attrs["columns"] = hdf5.text(json.dumps(sums))
        file.attrs["format"] = hdf5.text(FORMAT)  # last: without it the file is no cache


class ImageCache:
    """An opened cache of images; read-only, safe in any number of processes. Errors are UserErrors naming the file.

    An image's id is its path in the data set. Columns are read whole (some hundred bytes an image), encoded bytes come
    from one memory map of the file. With `verify`, an image's bytes are compared with their checksum before their use;
    that their head tells the size that the cache tells is seen to before their first use in any case.
    `facts` is what preparation told: files set aside and converted, the same file under two classes.
    """

    def __init__(self, path: Path | str, verify: bool = False):
        self.path = Path(path)
        self.file = open_file(self.path, "image")
        try:
            self._read_columns()
        except hdf5.FAULTS as error:
            self.file.close()
            if fault := hdf5.system_fault(error):
                raise UserError(f"{self.path} can not be read ({fault}): see to it, and run this again.") from None
            raise UserError(
                f"{self.path} is damaged ({shown(error, 80)}): prepare it again under another name."
            ) from None
        self.verifying = verify
        self._verified: set[int] = set()
        self._of_its_size: set[int] = set()

    def _read_columns(self) -> None:
        self.classes: list[tuple[str, str]] = [(str(a), str(b)) for a, b in json.loads(self._told("classes"))]
        self.preparation: dict[str, Any] = dict(json.loads(self._told("preparation")))
        self.origin = str(self._told("origin"))
        self._sums: dict[str, str] = dict(json.loads(self._told("columns")))
        with open(self.path, "rb") as raw:
            self._map = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
        self.ids: list[str] = [path.decode() for path in self._column("path").tolist()]
        self.target, self.group, self.size = (self._column(name) for name in ("target", "group", "size"))
        self._offsets, self._checksums = (self._column(name) for name in ("offsets", "checksum"))
        bytes_ = hdf5.dataset(self.file, "bytes", "u1", 1, len(self._map), plain=True)
        offset = bytes_.id.get_offset() or 0
        self._bytes = np.frombuffer(self._map, np.uint8, count=bytes_.size, offset=offset)
        self.near = self._column("near") if "near" in self._sums else self.group  # older caches have none: the same
        self.facts: dict[str, Any] = dict(json.loads(self._column("facts").tobytes()))
        count = len(self.ids)
        lengths = [
            len(c) for c in (self.target, self.group, self.near, self.size, self._checksums, self._stored("histogram"))
        ]
        steps = np.diff(self._offsets)
        if (
            {count, len(steps)} != {count, *lengths}
            or self.size.shape[1:] != (2,)
            or self._checksums.shape[1:] != (16,)
        ):
            raise ValueError("its columns differ in length")
        if self._offsets[0] != 0 or self._offsets[-1] != self._bytes.size or (steps < 1).any():
            raise ValueError("its offsets lie beyond its bytes")
        if count and not (self.target.min() >= 0 and self.target.max() < len(self.classes) and self.size.min() > 0):
            raise ValueError("its classes or sizes are out of range")
        if len(set(self.ids)) < count or not all(map(plain, self.ids)):
            raise ValueError("its names are no names of files")

    def _column(self, name: str) -> Any:
        values = self._stored(name)[()]
        if self._sums[name] != checksum([(name, values)]):
            raise ValueError(f"{name} has changed")
        return values

    def _told(self, name: str) -> Any:
        return hdf5.attribute(self.file, name)

    def _stored(self, name: str) -> Any:
        kind, axes = COLUMN_TYPES[name]
        return hdf5.dataset(self.file, name, kind, axes, len(self._map), plain=True)

    def encoded(self, index: int) -> np.ndarray:
        """The encoded bytes of an image, (length,) uint8, a view of the memory map."""
        content = self._bytes[self._offsets[index] : self._offsets[index + 1]]
        if self.verifying and index not in self._verified:
            if not self.intact(index):
                raise UserError(f"{self.path}: the bytes of image {self.ids[index]} have changed: prepare it again.")
            self._verified.add(int(index))
        if index not in self._of_its_size:
            self._check_size(index, content)
            self._of_its_size.add(int(index))
        return content

    def _check_size(self, index: int, content: np.ndarray) -> None:
        """Decoders make as many pixels as the bytes say, gigabytes of half a megabyte, and read many more formats."""
        size = sorted(self.size[index].tolist())  # after orientation by EXIF, which may turn it
        try:
            fits = sorted(told_size(content)) == size and size[1] <= LONGEST
        except ValueError:
            fits = False
        if not fits:
            words = "is no PNG or JPEG of the size that the cache tells"
            raise UserError(f"{self.path}: image {self.ids[index]} {words}: prepare it again.")

    @property
    def histogram(self) -> np.ndarray:
        """(N,F) float32."""
        try:
            return self._column("histogram")
        except hdf5.FAULTS as error:
            raise UserError(f"{self.path} is damaged ({shown(error, 80)}): prepare it again.") from None

    @property
    def cancers(self) -> list[str]:
        """The cancers, in the order of their classes."""
        return list(dict.fromkeys(cancer for cancer, _ in self.classes))

    @property
    def fingerprint(self) -> str:
        """A hash of every image's path, class, group and checksum: tells whether two caches hold the same data."""
        made = hashlib.blake2b(json.dumps(self.classes).encode(), digest_size=8)
        for name in ("path", "target", "group", "checksum"):
            made.update(np.ascontiguousarray(self.file[name][()]).tobytes())
        return made.hexdigest()

    def verify(self) -> Iterator[tuple[str, bool]]:
        """Yield (image, whether its bytes are those that were written); raises UserError for what is of all images."""
        assert len(self.histogram) == len(self.ids)
        for index, name in enumerate(self.ids):
            yield name, self.intact(index)

    def intact(self, index: int) -> bool:
        """Whether an image's bytes are those that were written."""
        content = self._bytes[self._offsets[index] : self._offsets[index + 1]]
        return digest(content) == self._checksums[index].tobytes()

    def close(self) -> None:
        """Close the file; the memory map ends with its last view."""
        self.file.close()
