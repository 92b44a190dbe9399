"""HDF5 files that may be damaged or made to harm: nothing is followed out of the file or unpacked beyond its size."""

import os
from typing import Any

import h5py
import numpy as np

# What the library and NumPy raise on bytes that make no sense.
FAULTS = (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError)
# deflate packs no better than this
DEFLATE = 1032
FILTERS = {"gzip", "lzf", None}
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


def group(parent: Any, name: str) -> Any:
    """A group of the file itself; raises KeyError for none, ValueError for a link to another place."""
    return _own(parent, name, h5py.Group)


def dataset(parent: Any, name: str, kind: str, axes: int, size: int, *, plain: bool = False) -> Any:
    """A dataset of the file itself, which has `size` bytes: its type as NumPy's `kind` (such as u1), so many axes, and
    no more bytes than can be in the file. `plain` refuses compression. Raises KeyError, ValueError.
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
    elif plain or found.compression not in FILTERS:
        raise ValueError(f"{name} is packed")
    elif found.nbytes > DEFLATE * min(size, found.id.get_storage_size()):
        raise ValueError(f"{name} unpacks to {found.nbytes:,} bytes")
    return found


def _own(parent: Any, name: str, kind: type) -> Any:
    link = parent.get(name, getlink=True)  # a KeyError where there is none
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{name} is a link to another place")
    found = parent[name]
    if not isinstance(found, kind):
        raise ValueError(f"{name} is no {kind.__name__.lower()}")
    return found
