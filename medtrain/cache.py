"""What HDF5 caches of both kinds have in common: their format, checksums, and the door they are opened by."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medtrain import hdf5
from medtrain.errors import UserError
from medtrain.wording import shown

FORMAT = "medtrain-cache"
VERSION = 2


def checksum(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """BLAKE2b over names, shapes, types and bytes, 16 bytes as hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays, key=lambda item: item[0]):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def kind_of(path: Path) -> str:
    """`volume` or `image`; raises UserError where the file is no cache."""
    with open_file(path) as file:
        return str(hdf5.attribute(file, "kind"))


def check_preparation(path: Path, preparation: Mapping[str, Any], version: int) -> None:
    """Refuse data that were prepared by other arithmetic than this program's `version`; raises UserError."""
    found = preparation.get("version")
    if found != version:
        words = f"version {shown(found, 20)}, this program needs {version}"
        raise UserError(f"{path} was prepared by another version of this program ({words}): prepare it again.")


def open_file(path: Path, kind: str | None = None) -> Any:
    """The HDF5 file of a cache of that kind, read-only; raises UserError."""
    remedy = "make it with `python launch/prepare.py`."
    if not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'not there'}: {remedy}")
    try:
        # no lock: it fails on read-only and some network file systems, and a whole cache is never written to
        file = hdf5.file(path)
    except hdf5.FAULTS as error:
        if fault := hdf5.system_fault(error):
            raise UserError(f"{path} can not be read ({fault}): see to it, and run this again.") from None
        raise UserError(f"{path} is not an HDF5 file or is cut short: {remedy}") from None
    about = {}
    for name in ("format", "version", "kind"):
        try:
            about[name] = hdf5.attribute(file, name)
        except hdf5.FAULTS:
            about[name] = None
    form, version, found = about.values()
    if form != FORMAT:
        file.close()
        words = "an HDF5 file of another program or of an earlier version of this one"
        raise UserError(f"{path} is {words}, or damaged: {remedy}")
    if version != VERSION or found not in ("volume", "image"):
        file.close()
        words = f"version {shown(version, 20)}, kind {shown(found, 20)}"
        raise UserError(f"{path} is a cache of {words}, this program reads version {VERSION}: {remedy}")
    if kind not in (None, found):
        file.close()
        raise UserError(f"{path} is a cache of {found}s, this recipe needs one of {kind}s: name the other one.")
    return file
