"""What is made of every kind of image file: kept, converted, or refused; and what is measured of it."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from picture_files import encode, picture
from PIL import Image, ImageOps

from medcls import images
from medcls.augment import whole
from medcls.duplicates import near_pairs
from medcls.phantom import make_image
from medcls.pipeline import ImageLoader
from medcls.pixels import decoded


def rotated(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(picture(), kind, exif=exif)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def decoded_by_dali(made: images.Examined, device: str) -> np.ndarray:
    """The stored bytes as the loader sees them, resized to 32 pixels."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")

    def source(info: object) -> tuple[np.ndarray, ...]:
        zeros = np.zeros(2, np.int64)
        return np.frombuffer(made.encoded, np.uint8), whole(made.size), zeros[:1], zeros

    loader = ImageLoader(source, batch=1, size=32, operations=(), mean=(0,) * 3, std=(1 / 255,) * 3, workers=0,
                         device=torch.device(device))  # fmt: skip
    return next(loader).image_BCHW[0].permute(1, 2, 0).cpu().numpy()


def decoded_by_a_worker(made: images.Examined) -> np.ndarray:
    """The stored bytes as a CPU's training sees them, resized to 32 pixels."""
    return decoded(np.frombuffer(made.encoded, np.uint8), (0, 0, *made.size), 32).astype(np.float32)


KEPT: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encode(picture(), "JPEG"),
    "progressive jpeg": lambda: encode(picture(), "JPEG", progressive=True),
    "grey jpeg": lambda: encode(picture().convert("L"), "JPEG"),
    "turned jpeg": lambda: rotated(6, "JPEG"),
    "mirrored jpeg": lambda: rotated(5, "JPEG"),
    "png": lambda: encode(picture()),
    "grey png": lambda: encode(picture().convert("L")),
    "palette png": lambda: encode(picture().convert("P")),
    "transparent png": lambda: encode(picture().convert("RGBA")),
    "black and white png": lambda: encode(picture().convert("1")),
    "one pixel": lambda: encode(picture(1, 1)),
    "one line": lambda: encode(picture(1, 50), "JPEG"),
}
CONVERTED: dict[str, tuple[Callable[[], bytes], str]] = {
    "cmyk jpeg": (lambda: encode(picture().convert("CMYK"), "JPEG"), "CMYK pixels"),
    "16 bit png": (lambda: encode(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40)), "I;16"),
    "float tiff": (lambda: encode(Image.fromarray(np.random.rand(20, 20).astype(np.float32)), "TIFF"), "TIFF file"),
    "bmp": (lambda: encode(picture(), "BMP"), "BMP file"),
    "webp": (lambda: encode(picture(), "WEBP", lossless=True), "WEBP file"),
    "turned png": (lambda: rotated(8, "PNG"), "rotated PNG"),
    "long png": (lambda: encode(Image.new("RGB", (20000, 30), "red")), "more than 4096"),
    "long jpeg": (lambda: encode(Image.new("RGB", (20000, 300), "red"), "JPEG"), "more than 4096"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", KEPT)
def test_common_files_are_kept_byte_by_byte_and_dali_sees_what_pillow_sees(name: str, device: str) -> None:
    content = KEPT[name]()
    made = images.examine(content)
    assert made.encoded == content or name.endswith(("turned jpeg", "mirrored jpeg"))  # these lose a fill byte
    assert made.converted == ""
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert made.size == (upright.height, upright.width)
    resized = np.asarray(upright.resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    assert np.abs(decoded_by_dali(made, device) - resized).mean() < (1.0 if device == "cpu" else 2.5)
    assert np.abs(decoded_by_a_worker(made) - resized).max() <= 1


@pytest.mark.parametrize("name", CONVERTED)
def test_odd_files_become_png_and_say_why(name: str) -> None:
    make, words = CONVERTED[name]
    made = images.examine(make())
    assert words in made.converted
    stored = Image.open(io.BytesIO(made.encoded))
    assert (stored.format, stored.mode, stored.size) == ("PNG", "RGB", made.size[::-1])
    assert max(made.size) <= 4096
    resized = np.asarray(stored.resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    assert np.abs(decoded_by_dali(made, "cpu") - resized).mean() < 1.0
    assert np.abs(decoded_by_a_worker(made) - resized).max() <= 1


def test_a_worker_says_that_bytes_are_no_image() -> None:
    with pytest.raises(ValueError, match="no image"):
        decoded(np.zeros(50, np.uint8), (0, 0, 1, 1), 8)


def test_16_bits_keep_their_order() -> None:
    ramp = np.linspace(0, 4000, 64 * 64).astype(np.uint16).reshape(64, 64)
    stored = Image.open(io.BytesIO(images.examine(encode(Image.fromarray(ramp))).encoded)).convert("L")
    values = np.asarray(stored)
    assert values.max() >= 200  # 12 bits fill the range, they do not end up dark
    assert (np.diff(values.ravel().astype(int)) >= 0).all()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty file"),
        (b"some text", "not an image"),
        (bytes(128) + b"DICM" + bytes(9), "DICOM, which is not read: export it as PNG"),
        (bytes(4) + b"ftypheic" + bytes(99), "HEIC, AVIF or a film"),
        (b"II*\0" + bytes(99), "a TIFF of a kind that is not read"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (encode(picture(300, 300), "JPEG")[:-900], "truncated"),
        (encode(picture(300, 300))[:-400], "truncated"),
        (encode(picture(), "JPEG")[:60], ""),
        (encode(Image.new("1", (20000, 20000))), "20000 x 20000 pixels are more than 100 megapixels"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 200, ""),
    ],
    ids=["empty", "text", "dicom", "heic", "tiff", "page", "short jpeg", "short png", "head only", "enormous", "zeros"],
)
def test_what_can_not_be_used_is_told(content: bytes, words: str) -> None:
    with pytest.raises(images.BadImage, match=words) as caught:
        images.examine(content)
    assert 0 < len(str(caught.value)) < 200


def test_a_hash_is_the_same_under_flips_turns_brightness_and_recompression() -> None:
    base = Image.fromarray(make_image(0, "Brain Cancer", "brain_glioma", 1))
    other = Image.fromarray(make_image(0, "Brain Cancer", "brain_glioma", 2))
    variants = [base, *(base.transpose(turn) for turn in Image.Transpose), base.resize((80, 80)),
                Image.open(io.BytesIO(encode(base, "JPEG", quality=50))), base.point(lambda v: v * 0.7)]  # fmt: skip
    variants.append(other)
    hashes = np.stack([images.perceptual_hashes(image.convert("RGB")) for image in variants])
    found = {tuple(pair) for pair in near_pairs(hashes).tolist()}
    last = len(variants) - 1
    assert all((0, n) in found for n in range(1, last))
    assert not any(last in pair for pair in found)


def test_colours_are_shares() -> None:
    values = images.colours(Image.new("RGB", (10, 10), (255, 0, 128)))
    assert values.shape == (images.HISTOGRAM,)
    assert values.sum() == pytest.approx(4)
    assert values[31] == values[32] == values[64 + 16] == values[96 + 3 * 16 + 0 + 2] == 1
