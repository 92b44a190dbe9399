"""Deep grey images made 8-bit: one hot pixel or exposure of another file changes nothing, told bits are believed."""

import io
import struct
import zlib

import numpy as np
import pytest
from picture_files import encode
from PIL import Image

from medcls import images

RAMP = np.linspace(0, 3500, 64 * 64).astype(np.uint16).reshape(64, 64)


def grey(content: bytes) -> tuple[np.ndarray, str]:
    """(H,W) of what the cache keeps of a file, and why it is not the file."""
    made = images.examine(content)
    return np.array(Image.open(io.BytesIO(made.encoded)).convert("L")), made.converted


def hot(pixels: np.ndarray, value: int = 65535) -> np.ndarray:
    spoilt = pixels.copy()
    spoilt[5, 7] = value
    return spoilt


def with_sbit(content: bytes, bits: int) -> bytes:
    """A PNG that tells its significant bits, as ISO/IEC 15948 wants: after IHDR."""
    body = b"sBIT" + bytes([bits])
    chunk = struct.pack(">I", 1) + body + struct.pack(">I", zlib.crc32(body))
    return content[:33] + chunk + content[33:]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("side", [64, 6])  # less than a thousand pixels, too
def test_one_hot_pixel_changes_no_other(kind: str, side: int) -> None:
    pixels = np.linspace(0, 3500, side * side).astype(np.uint16).reshape(side, side)
    spoilt = pixels.copy()
    spoilt[2, 3] = 65535
    plain, words = grey(encode(Image.fromarray(pixels), kind))
    other, _ = grey(encode(Image.fromarray(spoilt), kind))
    assert words.endswith("12 bits, as its brightness tells")
    assert other[2, 3] == 255
    other[2, 3] = plain[2, 3]
    assert np.array_equal(plain, other)
    assert np.array_equal(plain, pixels >> 4)


@pytest.mark.parametrize(("most", "bits"), [(200, 8), (900, 10), (4095, 12), (4500, 14), (60000, 16)])
def test_brightness_decides_among_the_usual_depths(most: int, bits: int) -> None:
    pixels = np.linspace(0, most, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    found, words = grey(encode(Image.fromarray(pixels)))
    assert words == f"I;16 pixels, {bits} bits, as its brightness tells"
    assert np.array_equal(found, pixels >> (bits - 8))


def test_a_dark_file_stays_dark_where_it_tells_its_bits() -> None:
    dark = (RAMP // 20).astype(np.uint16)  # of a camera of 12 bits; below 256
    assert grey(encode(Image.fromarray(dark)))[0].max() > 150  # nothing is told
    said = grey(with_sbit(encode(Image.fromarray(dark)), 12))
    assert said[1] == "I;16 pixels, 12 bits, as it tells"
    assert np.array_equal(said[0], dark >> 4)
    raised = grey(with_sbit(encode(Image.fromarray(dark << 4)), 12))  # as the standard wants it
    assert raised[1] == "I;16 pixels, 16 bits, as it tells"
    assert np.array_equal(raised[0], dark >> 4)
    for most in (4095, (4095,)):
        found, words = grey(encode(Image.fromarray(dark), "TIFF", tiffinfo={341: most}))
        assert words == "TIFF file, 12 bits, as it tells"
        assert np.array_equal(found, dark >> 4)


def test_what_was_measured_tells_no_bits() -> None:
    """SMaxSampleValue is the largest value there is in some files."""
    found, words = grey(encode(Image.fromarray(hot(RAMP, 50000)), "TIFF", tiffinfo={341: 50000}))
    assert words == "TIFF file, 12 bits, as its brightness tells"
    assert found[40, 40] == RAMP[40, 40] >> 4


def test_twelve_bits_a_sample() -> None:
    """A TIFF of BitsPerSample 12, written by hand: Pillow reads such files and writes none."""
    row = bytes([0x12, 0x34, 0x56] * 4)  # 0x123, 0x456, eight samples
    entries = [(256, 3, 8), (257, 3, 8), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
               (278, 3, 8), (279, 4, len(row) * 8)]  # fmt: skip
    tags = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    pixels = row * 8
    content = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels
    content += struct.pack("<H", len(entries)) + tags + struct.pack("<I", 0)
    found, words = grey(content)
    assert words == "TIFF file, 12 bits, as it tells"
    assert found[0].tolist() == [0x12, 0x45] * 4


def test_a_grey_map_is_scaled_by_its_largest_number() -> None:
    dark = (RAMP // 20).astype(">u2")
    found, words = grey(b"P5 64 64 4095\n" + dark.tobytes())
    assert words == "PPM file, 16 bits, as it tells"
    assert np.abs(found.astype(int) - (dark >> 4)).max() <= 1
    assert grey(encode(Image.fromarray(RAMP), "PPM"))[1] == "PPM file, 12 bits, as its brightness tells"  # of 65535


def test_floats_are_stretched_between_quantiles() -> None:
    values = RAMP.astype(np.float32)
    values[5, 7] = 1e9
    found, words = grey(encode(Image.fromarray(values), "TIFF"))
    assert words == "TIFF file, stretched"
    assert found[63, 40] > 250
    assert int(found[32, 32]) == pytest.approx(128, abs=3)
    flat, _ = grey(encode(Image.fromarray(np.full((9, 9), 3.5, np.float32)), "TIFF"))
    assert (flat == 0).all()


def test_more_than_16_bits() -> None:
    deep = (RAMP.astype(np.int32) << 19) - 5
    found, words = grey(encode(Image.fromarray(deep), "TIFF"))
    assert words == "TIFF file, 32 bits, as its brightness tells"
    assert found.max() == deep.max() >> 24
    assert found[0, 0] == 0  # below 0
