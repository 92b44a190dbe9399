"""Grey pixels of more than 8 bits made 8-bit ones: by the bits that the file tells, else by its brightness."""

import io
import itertools

import numpy as np
from PIL import Image

from medcls.metadata import png_chunks

DEPTHS = (8, 10, 12, 14, 16)
# Share of the pixels that decide; what is above it, such as a hot pixel, ends up white.
SHARE = 0.999
# TIFF 6.0
BITS_PER_SAMPLE, LARGEST_SAMPLE = 258, 341


def eight_bit(image: Image.Image, content: bytes, kind: str) -> tuple[Image.Image, str]:
    """(8-bit image, how it was made so, "" where it was one). `content` and `kind` are the file's.

    Whole numbers of b bits are shifted to 8 (x >> (b - 8), at most 255); b is what `told_bits` finds, else what
    `likely_bits` does. Floats are stretched so that the 0.1 % and 99.9 % quantiles become 0 and 255.
    """
    if not image.mode.startswith(("I", "F")):
        return image, ""
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values.astype(np.float64))
        low, high = np.quantile(values, 1 - SHARE, method="higher"), np.quantile(values, SHARE, method="lower")
        if high <= low:  # almost all pixels are alike, or there are a few only
            low, high = values.min(), values.max()
        grey = np.clip((values - low) / ((high - low) or 1.0), 0, 1) * 255
        return Image.fromarray(grey.astype(np.uint8)), "stretched"
    whole = values if values.dtype.kind == "u" else np.clip(values.astype(np.int64), 0, None)
    told = told_bits(whole, content, kind)
    bits = told or likely_bits(whole)
    grey = np.minimum(whole >> max(0, bits - 8), 255)
    return Image.fromarray(grey.astype(np.uint8)), f"{bits} bits, as {'it tells' if told else 'its brightness tells'}"


def likely_bits(whole: np.ndarray) -> int:
    """The fewest of 8, 10, 12, 14 or 16 bits (else 32) that hold 99.9 % of the pixels, and all but the largest of fewer
    than a thousand: one hot pixel does not decide.
    """
    most = int(np.quantile(whole, SHARE, method="lower"))
    return next((bits for bits in DEPTHS if most < 1 << bits), 32)


def told_bits(whole: np.ndarray, content: bytes, kind: str) -> int | None:
    """The bits of the pixels `whole` by the file's own words, None where there are none.

    PNG: sBIT, whose samples a careful writer has shifted up to 16 bits and others have not. TIFF: BitsPerSample below
    16, or SMaxSampleValue where it is the largest number of so many bits. PGM and JPEG 2000 of less than 16 bits:
    Pillow has scaled these to 16. That samples lie in 16 bits says nothing: cameras of 12 bits write such files, too.
    """
    if kind == "PNG":
        return _png_bits(whole, content)
    if kind == "TIFF":
        tags = Image.open(io.BytesIO(content), formats=(kind,)).tag_v2  # type: ignore[attr-defined]
        largest, each = (tags.get(tag) for tag in (LARGEST_SAMPLE, BITS_PER_SAMPLE))
        told = [bits for bits in DEPTHS if largest in ((1 << bits) - 1, ((1 << bits) - 1,))]
        return next(iter(told or [bits for bits in DEPTHS[:-1] if each == (bits,)]), None)
    if kind == "PPM":
        arguments = Image.open(io.BytesIO(content), formats=(kind,)).tile[0].args
        return 16 if isinstance(arguments, tuple) and arguments[-1] != 65535 else None
    if kind == "JPEG2000":
        start = content.find(b"\xff\x4f\xff\x51")  # ITU-T T.800, A.5.1: the precision of the first component
        return 16 if start >= 0 and (content[start + 42] & 0x7F) + 1 < 16 else None
    return None


def _png_bits(whole: np.ndarray, content: bytes) -> int | None:
    before = itertools.takewhile(lambda item: item[0] != b"IDAT", png_chunks(content))
    told = next((chunk[8] for name, chunk in before if name == b"sBIT" and len(chunk) > 12), 0)
    if not 1 <= told <= 16:
        return None
    # shifted up (ISO/IEC 15948, 11.3.2.7), so small a number would end in zeros
    below = int(whole.max()) < 1 << told and bool((whole & ((1 << (16 - told)) - 1)).any())
    return max(8, told) if below else 16
