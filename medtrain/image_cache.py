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

import h5py
import numpy as np

from medtrain.cache import FORMAT, VERSION, open_file
from medtrain.errors import UserError
from medtrain.files import replacing

COLUMNS = ("target", "size", "checksum", "histogram")


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


def write_images(out: Path, parts: Iterable[Images], *, size: int, groups: np.ndarray,
                 classes: Sequence[tuple[str, str]], facts: Mapping[str, Any],
                 preparation: Mapping[str, Any]) -> None:  # fmt: skip
    """Join parts of `size` bytes together into one cache, atomically, holding one part at a time.

    `groups` (N,) are the near-duplicate groups; `facts` are JSON-able (what was set aside, and why).
    """
    with replacing(out) as temporary, h5py.File(temporary, "w", libver="v110") as file:
        file.attrs.update({"format": FORMAT, "version": VERSION, "kind": "image"})
        file.attrs["classes"] = json.dumps([list(pair) for pair in classes])
        file.attrs["preparation"] = json.dumps(dict(preparation))
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
        for name, column in columns.items():
            file[name] = np.concatenate(column)
        file["facts"] = np.frombuffer(json.dumps(dict(facts)).encode(), np.uint8)


class ImageCache:
    """An opened cache of images; read-only, safe in any number of processes. Errors are UserErrors naming the file.

    An image's id is its path in the data set. Columns are read whole (some dozen bytes an image), encoded bytes come
    from one memory map of the file.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.file = open_file(self.path, "image")
        try:
            self._read_columns()
        except (KeyError, ValueError, OSError):
            self.file.close()
            raise UserError(f"{self.path} is damaged: prepare it again under another name.") from None

    def _read_columns(self) -> None:
        self.classes: list[tuple[str, str]] = [(a, b) for a, b in json.loads(self.file.attrs["classes"])]
        self.preparation: dict[str, Any] = json.loads(self.file.attrs["preparation"])
        self.ids: list[str] = [path.decode() for path in self.file["path"][()].tolist()]
        self.target: np.ndarray = self.file["target"][()]
        self.group: np.ndarray = self.file["group"][()]
        self.size: np.ndarray = self.file["size"][()]
        self._offsets: np.ndarray = self.file["offsets"][()]
        with open(self.path, "rb") as raw:
            whole = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
        dataset = self.file["bytes"]
        self._bytes = np.frombuffer(whole, np.uint8, count=dataset.size, offset=dataset.id.get_offset())

    def encoded(self, index: int) -> np.ndarray:
        """The encoded bytes of an image, (length,) uint8, a view of the memory map."""
        return self._bytes[self._offsets[index] : self._offsets[index + 1]]

    @property
    def histogram(self) -> np.ndarray:
        """(N,F) float32."""
        return self.file["histogram"][()]

    @property
    def facts(self) -> dict[str, Any]:
        """What preparation told: files set aside and converted, the same file under two classes."""
        return json.loads(self.file["facts"][()].tobytes())

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
        """Yield (image, whether its bytes are those that were written)."""
        sums = self.file["checksum"][()]
        for index, name in enumerate(self.ids):
            yield name, digest(self.encoded(index).tobytes()) == sums[index].tobytes()

    def close(self) -> None:
        """Close the file; the memory map ends with its last view."""
        self.file.close()
