"""HDF5 files that may be damaged or made to harm: nothing is followed out of the file or unpacked beyond its size."""

import math
import os
import zlib
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import h5py
import numpy as np

# What the library and NumPy raise on bytes that make no sense.
FAULTS = (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError)
# deflate packs no better than this
DEFLATE = 1032
# How caches pack, and nothing else: filters that follow one another multiply what each makes of a byte, and h5py's
# `compression` does not tell of all. Chunks have this side, or the data set's where it is shorter.
FILTERS = (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE)
SIDE = 64
# Of an attribute; the classes of a large data set are told in one.
MOST_ATTRIBUTE = 1 << 20


def system_fault(error: BaseException) -> str:
    """What the system lacks (a permission, a disk that answers, memory), where the file's bytes are not at fault; else
    an empty text. h5py's errors about a file's form have no number.
    """
    if isinstance(error, MemoryError):
        return "out of memory"
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else ""


def text(value: str) -> np.ndarray:
    """A text as an attribute that lies in its object's own header, which HDF5 checks with a checksum. As h5py writes a
    plain str it would lie in a heap without one, where changed bytes can make the library loop for ever.
    """
    content = value.encode()
    return np.array(content, f"S{max(1, len(content))}")


def attribute(place: Any, name: str) -> Any:
    """A text or number that `text` or a number wrote; raises KeyError where there is none, ValueError for others."""
    found = place.attrs.get_id(name)  # reads its type only
    if found.shape != () or found.dtype.kind not in "Siuf" or found.dtype.itemsize > MOST_ATTRIBUTE:
        raise ValueError(f"{name} is an attribute of another type")
    value = place.attrs[name]
    return value.decode("utf-8") if isinstance(value, bytes) else value


def file(path: Path, mode: str = "r", **how: Any) -> h5py.File:
    """A file as h5py opens it, but without HDF5's own lock, which many network file systems do not have: what is read
    is whole and changes no more, and what is written has a name of its own.
    """
    return h5py.File(path, mode, locking=False, **how)


def group(parent: Any, name: str) -> Any:
    """A group of the file itself; raises KeyError for none, ValueError for a link to another place."""
    return _own(parent, name, h5py.Group)


def dataset(parent: Any, name: str, kind: str, axes: int, size: int, *, plain: bool = False) -> Any:
    """A dataset of the file itself, which has `size` bytes: its type as NumPy's `kind` (such as u1), so many axes, and
    no more bytes than can be in the file. `plain` refuses compression, else it may be `Packed`. Raises KeyError,
    ValueError.
    """
    found = _own(parent, name, h5py.Dataset)
    if found.dtype.str[1:] != kind and not (kind == "S" and found.dtype.kind == "S"):
        raise ValueError(f"{name} is {found.dtype}")
    if len(found.shape) != axes:
        raise ValueError(f"{name} has shape {found.shape}")
    if found.is_virtual or found.external:
        raise ValueError(f"{name} lies in another file")
    if found.size == 0:
        return found
    offset = found.id.get_offset()
    if found.chunks is None:
        if offset is None or offset + found.nbytes > size:
            raise ValueError(f"{name} goes beyond the file's end")
    elif plain or found.chunks != tuple(min(n, SIDE) for n in found.shape) or _filters(found) != FILTERS:
        raise ValueError(f"{name} is packed in another way")
    elif found.nbytes > DEFLATE * min(size, found.id.get_storage_size()):
        raise ValueError(f"{name} unpacks to {found.nbytes:,} bytes")
    else:
        return Packed(found, name)
    return found


def _filters(found: Any) -> tuple[int, ...]:
    """The numbers of the filters that a dataset's bytes have gone through, in their order."""
    plan = found.id.get_create_plist()
    return tuple(plan.get_filter(n)[0] for n in range(plan.get_nfilters()))


class Packed:
    """A packed dataset, which is read as h5py's; ValueError where a chunk does not unpack to the size of a chunk.

    HDF5 asks for no such thing: it unpacks a stream to its end, gigabytes from a chunk of kilobytes, and where too
    little came out it reads on beyond that. So each chunk is unpacked here, within bounds, before the library does for
    the first time; afterwards that is a look into a set, and what is not packed never comes here.
    """

    def __init__(self, found: Any, name: str):
        self.id, self.shape, self.dtype, self.size = found.id, found.shape, found.dtype, found.size
        self._found, self._name = found, name
        self._seen: set[tuple[int, ...]] = set()

    def __getitem__(self, box: Any) -> Any:
        for start in self._starts(box):
            if start not in self._seen:
                self._check(start)
                self._seen.add(start)
        return self._found[box]

    def _starts(self, box: Any) -> Iterable[tuple[int, ...]]:
        """Where the chunks begin that a box (..., slices) touches; all of them for other indices."""
        slices = box[1:] if isinstance(box, tuple) and box[:1] == (Ellipsis,) else ()
        slices = slices if all(isinstance(part, slice) for part in slices) else ()
        ends = [(0, n) for n in self.shape[: len(self.shape) - len(slices)]]
        ends += [part.indices(n)[:2] for part, n in zip(slices, self.shape[len(ends) :], strict=True)]
        return product(*(range(low // c * c, high, c) for (low, high), c in zip(ends, self._found.chunks, strict=True)))

    def _check(self, start: tuple[int, ...]) -> None:
        size = math.prod(self._found.chunks) * self.dtype.itemsize
        if self.id.get_chunk_info_by_coord(start).size > 2 * size + 64:  # deflate adds little to what it can not pack
            raise ValueError(f"{self._name} has a chunk that is too long")
        skipped, content = self.id.read_direct_chunk(start)
        if not skipped & 1 << FILTERS.index(h5py.h5z.FILTER_DEFLATE):
            try:
                content = zlib.decompressobj().decompress(content, size + 1)
            except zlib.error:
                raise ValueError(f"{self._name} can not be unpacked") from None
        if len(content) != size:
            raise ValueError(f"{self._name} has a chunk that unpacks to another size")


def _own(parent: Any, name: str, kind: type) -> Any:
    link = parent.get(name, getlink=True)  # a KeyError where there is none
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{name} is a link to another place")
    found = parent[name]
    if not isinstance(found, kind):
        raise ValueError(f"{name} is no {kind.__name__.lower()}")
    return found
