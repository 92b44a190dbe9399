"""Makes small data sets and damages them: scans, listings, images and caches as no careful person would write them."""

import gzip
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

CASE = "CASE_1"
IMAGE, LABEL, LISTING = f"imagesTr/{CASE}.nii.gz", f"labelsTr/{CASE}.nii.gz", "dataset.json"
SHAPE = (10, 12, 8)
HEADER = nib.Nifti1Header.template_dtype


def scan(channels: int = 4, dtype: Any = np.int16) -> np.ndarray:
    """A small (X,Y,Z,C) image; zero at its rim."""
    image = np.zeros((*SHAPE, channels), dtype)
    image[1:-1, 1:-1, 1:-1] = np.random.default_rng(0).integers(1, 900, (8, 10, 6, channels))
    return image


def label() -> np.ndarray:
    """Codes 0 to 3 on the same grid."""
    codes = np.zeros(SHAPE, np.uint8)
    codes[3:6, 3:6, 2:5], codes[4, 4, 3], codes[5, 5, 4] = 1, 2, 3
    return codes


def nifti(array: np.ndarray, affine: np.ndarray | None = None) -> bytes:
    """A file's bytes, not compressed."""
    return nib.Nifti1Image(array, np.eye(4) if affine is None else affine).to_bytes()


def with_header(raw: bytes, **fields: Any) -> bytes:
    """The same file with other values in its header, whatever they mean."""
    header = np.frombuffer(bytearray(raw[: HEADER.itemsize]), HEADER)
    for name, value in fields.items():
        header[name] = value
    return header.tobytes() + raw[HEADER.itemsize :]


def dim(*sizes: int) -> np.ndarray:
    """The header's field of that name: how many axes, then their lengths."""
    return np.array([len(sizes), *sizes, *[1] * (7 - len(sizes))], np.int16)


def listing(**changes: Any) -> dict[str, Any]:
    """A dataset.json of one case."""
    return {
        "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
        "training": [{"image": f"./{IMAGE}", "label": f"./{LABEL}"}],
        **changes,
    }


def msd_folder(place: Path) -> Path:
    """A data set of one case."""
    for path, content in ((IMAGE, nifti(scan())), (LABEL, nifti(label()))):
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(gzip.compress(content, 1))
    (place / LISTING).write_text(json.dumps(listing()))
    return place


def brats_folder(place: Path) -> Path:
    """A case folder as BraTS gives it, labelled."""
    folder = place / "BraTS_1"
    folder.mkdir(parents=True)
    for channel, name in enumerate(("flair", "t1", "t1ce", "t2")):
        (folder / f"BraTS_1_{name}.nii.gz").write_bytes(gzip.compress(nifti(scan()[..., channel]), 1))
    codes = np.array([0, 2, 1, 4], np.uint8)[label()]
    (folder / "BraTS_1_seg.nii.gz").write_bytes(gzip.compress(nifti(codes), 1))
    return place


def rewritten(path: Path, change: Callable[[bytes], bytes], *, packed: bool = True) -> None:
    """Change a compressed file's content, or, if not `packed`, its bytes as they are."""
    content = path.read_bytes()
    path.write_bytes(gzip.compress(change(gzip.decompress(content)), 1) if packed else change(content))


def chunk(kind: bytes, content: bytes) -> bytes:
    """A piece of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *extra: bytes, rows: bytes | None = None) -> bytes:
    """An RGB PNG file of one colour whose header may say anything."""
    pixels = zlib.compress(b"".join(b"\0" + b"\x55" * 3 * width for _ in range(height)) if rows is None else rows)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def nested(depth: int, inner: str = "1") -> str:
    """A JSON list in a list in a list."""
    return "[" * depth + inner + "]" * depth
