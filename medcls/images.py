"""One image file: whether it can be used, the bytes the cache keeps, and what is known of it without a network."""

import errno
import io
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from medcls.cache import digest
from medcls.depth import eight_bit
from medcls.keypoints import features
from medcls.metadata import without_metadata
from medtrain.wording import shown

# Raise it whenever a stored byte or number would change.
VERSION = 3
MEGAPIXELS = 100  # of a file that must be decoded whole; JPEG may have MEGAPIXELS_JPEG, it is decoded smaller
MEGAPIXELS_JPEG = 450
MOST_BYTES = 512 << 20
# Of the many that Pillow knows; EPS among them runs another program on what the file says.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")
LONGEST, SHRUNK = 4096, 2048  # a longer side is shrunk to SHRUNK
HASH_SIDE = 16
# The eight symmetries of the square; None is the image itself.
TURNS = (None, *Image.Transpose)
HISTOGRAM = 3 * 32 + 64


class BadImage(Exception):
    """The file can not be used; the message says why."""


@dataclass(frozen=True)
class Examined:
    """A usable image.

    `encoded`: the file's own bytes without its metadata, or PNG where `converted` says why not. `size`: height and
    width after EXIF orientation. `digest`: of the file's bytes. `hashes` (8,4) uint64: perceptual hash under TURNS.
    `places` (2,P,2) and `descriptors` (2,P,32): see `keypoints.features`. `histogram` (160,) float32: see `colours`.
    """

    encoded: bytes
    converted: str
    size: tuple[int, int]
    digest: bytes
    hashes: np.ndarray
    places: np.ndarray
    descriptors: np.ndarray
    histogram: np.ndarray


def read_file(path: Path) -> bytes:
    """An image file's bytes; raises BadImage for what is no file of an image's size, OSError where the disk fails."""
    try:
        about = path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise BadImage(error.strerror or "no file") from None
        raise
    if not stat.S_ISREG(about.st_mode):  # reading a pipe or a device would never end
        raise BadImage("no regular file")
    if about.st_size > MOST_BYTES:
        raise BadImage(f"{about.st_size >> 20} MB are more than {MOST_BYTES >> 20}")
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise BadImage(error.strerror or "no file") from None


def examine(content: bytes) -> Examined:
    """Decode a file whole, once; raises BadImage where it is not an image, cut short, or too large."""
    rgb, encoded, converted = usable(content)
    with _as_bad_images():
        return Examined(encoded, converted, (rgb.height, rgb.width), digest(content),
                        perceptual_hashes(rgb), *features(rgb), colours(rgb))  # fmt: skip


def usable(content: bytes) -> tuple[Image.Image, bytes, str]:
    """(upright RGB image, bytes that DALI decodes to it, why they are not the file's own or ""); raises BadImage."""
    with _as_bad_images(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not content:
            raise BadImage("empty file")
        image, converted = _decoded(content)
        grey, how = eight_bit(ImageOps.exif_transpose(image), content, str(image.format))
        rgb = grey.convert("RGB")
        converted = f"{converted}, {how}" if how else converted
        if not converted:
            try:
                return rgb, without_metadata(content, str(image.format), _orientation(image)), ""
            except ValueError as error:
                converted = str(error)
        out = io.BytesIO()
        rgb.save(out, "PNG", compress_level=3)
        return rgb, without_metadata(out.getvalue(), "PNG"), converted  # Pillow hands colour profiles on


@contextmanager
def _as_bad_images() -> Iterator[None]:
    """Decoders raise whatever the bytes make them stumble over."""
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(NO_IMAGE) from None
    except MemoryError:
        raise BadImage("it does not fit into memory") from None
    except Exception as error:
        raise BadImage(shown(str(error).splitlines()[0], 100) if str(error) else type(error).__name__) from None


def _decoded(content: bytes) -> tuple[Image.Image, str]:
    """The image and why its bytes can not be kept ("" if they can)."""
    Image.MAX_IMAGE_PIXELS = None  # the limits below are ours
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage(_other_kind(content)) from None
    kind, (width, height) = image.format, image.size
    limit = MEGAPIXELS_JPEG if kind in ("JPEG", "MPO") else MEGAPIXELS
    if width * height > limit * 1e6:
        raise BadImage(f"{width} x {height} pixels are more than {limit} megapixels")
    large = max(width, height) > LONGEST
    if large and kind == "JPEG":
        image.draft("RGB", (SHRUNK, SHRUNK))
    image.load()
    if large:
        image.thumbnail((SHRUNK, SHRUNK))
        return image, f"a side of more than {LONGEST} pixels"
    if kind not in ("JPEG", "PNG"):
        return image, f"{kind} file"
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        return image, f"{image.mode} pixels"
    if kind == "PNG" and _orientation(image) != 1:
        return image, "rotated PNG"
    return image, ""


NO_IMAGE = "not an image"


def _other_kind(content: bytes) -> str:
    """What a file is that is no image here, by its first bytes."""
    if content[128:132] == b"DICM":
        return "DICOM, which is not read: export it as PNG"
    if content[4:8] == b"ftyp":
        return "HEIC, AVIF or a film, which is not read: convert it to PNG"
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "a TIFF of a kind that is not read (a whole slide, say): export it as PNG"
    if content[:512].lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page"
    return NO_IMAGE


def _orientation(image: Image.Image) -> int:
    """1 to 8 of EXIF; Pillow takes what else a file may say for upright."""
    told = image.getexif().get(0x0112, 1)
    return told if told in range(1, 9) else 1


def perceptual_hashes(rgb: Image.Image) -> np.ndarray:
    """(8,4) uint64: imagehash's 256-bit DCT hash (Zauner 2010) of the image under each of TURNS.

    The image is first made a 32-pixel square, so that flips and quarter turns permute its pixels exactly.
    """
    box, fine = Image.Resampling.BOX, Image.Resampling.LANCZOS
    square = rgb.convert("L").resize((128, 128), box).resize((32, 32), fine)
    turned = (square if turn is None else square.transpose(turn) for turn in TURNS)
    bits = [imagehash.phash(image, hash_size=HASH_SIDE, highfreq_factor=2).hash.ravel() for image in turned]
    return np.packbits(np.stack(bits), axis=1).view(np.uint64)


def colours(rgb: Image.Image) -> np.ndarray:
    """(160,) float32: 32 bins of each channel, then 4 x 4 x 4 bins of the colours; shares of the pixels."""
    pixels = np.asarray(rgb.resize((64, 64), Image.Resampling.BOX)).reshape(-1, 3)
    single = [np.bincount(pixels[:, c] >> 3, minlength=32) for c in range(3)]
    coarse = (pixels >> 6).astype(np.int64)
    joint = np.bincount(coarse @ np.array([16, 4, 1]), minlength=64)
    return np.concatenate([*single, joint]).astype(np.float32) / len(pixels)
