"""One NIfTI file: its header is checked before a voxel is read, and nothing in it is believed.

Legend of shapes: X Y Z the file's voxel axes.
"""

import gzip
import logging
import math
import os
import zlib
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling
from nibabel.wrapstruct import WrapStructError

from medtrain.errors import UserError
from medtrain.paths import spelt
from medtrain.wording import shown

# 1024^3; four channels of 512^3 are half of it
MOST_VOXELS = 2**30
# Header extensions, which are skipped, and what may follow the voxels.
MOST_BESIDE = 64 << 20
# deflate packs no better than this
DEFLATE = 1032
# Free texts where scanners and converters leave names and paths; they go no further.
TEXTS = ("descrip", "aux_file", "db_name", "intent_name", "data_type")
FORMS = {348: (nib.Nifti1Header, b"n+1"), 540: (nib.Nifti2Header, b"n+2")}
_SILENT = logging.getLogger("medseg.nifti")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


class _Damaged(Exception):
    """The file is not what it says; the message is the reason."""


class Unreadable(UserError):
    """Disk, network or memory fail, not the file: it may be read the next time."""


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray, bytes]:
    """(voxels float32, affine (4,4), a NIfTI-1 header of 348 bytes without free texts); raises UserError.

    Unreadable is the UserError where the file is not to blame.
    Axes of length 1 after the third, where converters keep a time that there is not, are dropped from the end.
    """
    if not path.is_file():
        # it was when the data set was listed: a disk or network went away, and the others may follow
        raise Unreadable(f"{spelt(path)} is not there: restore it or take the case out.")
    try:
        with path.open("rb") as raw:
            size = os.fstat(raw.fileno()).st_size
            packed = raw.read(2) == b"\x1f\x8b"  # whatever its name says
            raw.seek(0)
            if not packed:
                header, data = _read(path, raw, size, size)
            else:
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    header, data = _read(path, unpacked, size, size * DEFLATE)  # type: ignore[arg-type]
        affine = np.asarray(header.get_best_affine(), float)
        kept = nib.Nifti1Header.from_header(header, check=False)
    except (_Damaged, OSError, EOFError, zlib.error, ValueError, OverflowError, HeaderDataError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # gzip's own have none
            raise Unreadable(f"{spelt(path)} can not be read ({error.strerror}): run it again.") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{spelt(path)} is cut short or damaged ({shown(reason, 80)}): copy it again.") from None
    except MemoryError:
        raise Unreadable(f"{spelt(path)} does not fit into memory: crop it, or give fewer --workers.") from None
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UserError(f"{spelt(path)} has an affine that is not invertible: correct its header.")
    for name in TEXTS:
        kept[name] = b""
    # as of an image in memory: what is written with it has an offset and scale of its own
    kept["vox_offset"], kept["scl_slope"], kept["scl_inter"] = 0, math.nan, math.nan
    return data, affine, kept.binaryblock


def _read(path: Path, file: IO[bytes], size: int, most: int) -> tuple[Any, np.ndarray]:
    """Header and voxels, scaled; `most` bytes at most can be in a file of `size`."""
    header = _header(file, size)
    shape, dtype = _shape(header), header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise UserError(f"{spelt(path)} holds {dtype.name} voxels: export it with real numbers of 64 bits at most.")
    count = math.prod(shape)
    if count > MOST_VOXELS:
        raise UserError(f"{spelt(path)} says it has {count:,} voxels, more than {MOST_VOXELS:,}: crop or resample it.")
    offset, slope_inter = _offset(header), _scale(header)
    if offset + count * dtype.itemsize > most:
        raise _Damaged(f"{count * dtype.itemsize:,} bytes of voxels can not be in it")
    file.seek(offset)
    content = bytearray(count * dtype.itemsize)
    view, at = memoryview(content), 0
    while at < len(content):
        found = file.readinto(view[at:])  # type: ignore[attr-defined]
        if not found:
            raise _Damaged(f"it has {at:,} of {len(content):,} bytes of voxels")
        at += found
    _read_on(file)
    array = np.frombuffer(content, dtype).reshape(shape, order="F")
    with np.errstate(all="ignore"):  # what overflows is infinite, and refused as such
        return header, apply_read_scaling(array, *slope_inter).astype(np.float32, copy=False)


def _header(file: IO[bytes], size: int) -> Any:
    block = file.read(540)
    if len(block) < 348:
        raise _Damaged("empty file" if not size else "no whole header")
    sizes = [int.from_bytes(block[:4], order) for order in ("little", "big")]
    known = next((n for n in sizes if n in FORMS), 0)
    if not known or len(block) < known:
        raise _Damaged("no NIfTI header")
    kind, magic = FORMS[known]
    header = kind(block[:known], check=False)
    sizes_mm = header["pixdim"][1:4]
    if header["sform_code"] == 0 and not (np.isfinite(sizes_mm).all() and sizes_mm.all()):  # nibabel would guess 1 mm
        raise _Damaged("voxels of no size")
    if header["magic"].item()[:3] != magic:
        raise _Damaged("no NIfTI header of a single file")
    try:
        header.check_fix(logger=_SILENT)
    except WrapStructError as error:
        raise _Damaged(str(error)) from None
    return header


def _shape(header: Any) -> tuple[int, ...]:
    axes, *lengths = (int(n) for n in header["dim"])
    if not 1 <= axes <= 7 or min(lengths[:axes]) < 1:
        raise _Damaged(f"shape {tuple(lengths[: max(0, min(axes, 7))])}")
    while axes > 3 and lengths[axes - 1] == 1:
        axes -= 1
    return tuple(lengths[:axes])


def _offset(header: Any) -> int:
    offset, least = float(header["vox_offset"]), header.single_vox_offset
    if not least <= offset <= least + MOST_BESIDE:
        raise _Damaged(f"vox_offset {offset:g}")
    return int(offset)


def _scale(header: Any) -> tuple[Any, Any]:
    """Slope and intercept; nibabel writes NaN for both where there are none, 0 is the standard's way to say so."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or (math.isnan(slope) and math.isnan(inter)):
        return np.asanyarray(1.0), np.asanyarray(0.0)
    if not (math.isfinite(slope) and math.isfinite(inter)):
        raise _Damaged(f"scl_slope {slope:g}, scl_inter {inter:g}")
    return np.asanyarray(slope), np.asanyarray(inter)


def _read_on(file: IO[bytes]) -> None:
    """To the end, where gzip compares its checksum."""
    left = MOST_BESIDE
    while content := file.read(1 << 20):
        left -= len(content)
        if left < 0:
            raise _Damaged("it goes on after the voxels")
