"""A cache of images from elsewhere: whatever its bytes are, decoders get what the cache says of them."""

from pathlib import Path

import numpy as np
import pytest
from hostile import png
from picture_files import encode, picture
from PIL import Image

from medcls import cache, images
from medcls.cache import ImageCache, Images, digest, told_size, write_images
from medtrain.errors import UserError


def written(folder: Path, content: bytes, height: int, width: int) -> ImageCache:
    """A cache of one image that tells this size of it."""
    columns = {
        "target": np.zeros(1, np.int32), "size": np.array([[height, width]], np.int32),
        "checksum": np.frombuffer(digest(content), np.uint8)[None], "histogram": np.zeros((1, 3), np.float32),
    }  # fmt: skip
    write_images(folder / "c.h5", [Images([content], ["a/1.png"], columns)], size=len(content), groups=np.zeros(1),
                 classes=[("X", "a")], facts={}, preparation={})  # fmt: skip
    return ImageCache(folder / "c.h5")


def turned(**options: object) -> bytes:
    """A JPEG that is to be turned by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(picture(), "JPEG", exif=exif, **options)


JPEG = encode(picture(), "JPEG")
GOOD = {
    "PNG": encode(picture()),
    "grey PNG": encode(picture().convert("L")),
    "JPEG": JPEG,
    "progressive JPEG": encode(picture(), "JPEG", progressive=True),
    "grey JPEG": encode(picture().convert("L"), "JPEG"),
    "turned JPEG": turned(),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_preparation_keeps_is_handed_out(name: str, tmp_path: Path) -> None:
    made = images.examine(GOOD[name])
    assert made.converted == ""
    assert told_size(np.frombuffer(made.encoded, np.uint8)) == (40, 56)  # before it is turned
    opened = written(tmp_path, made.encoded, *made.size)
    for _ in range(2):
        assert opened.encoded(0).tobytes() == made.encoded


BAD = {
    "a PNG of more pixels": png(8000, 8000, rows=bytes(9)),
    "a JPEG of more pixels": encode(picture(400, 560), "JPEG"),
    "a JPEG of fewer pixels": encode(picture(4, 5), "JPEG"),
    "a fill byte before the frame": JPEG[:2] + b"\xff" + JPEG[2:],
    "a marker without a length before the frame": JPEG[:2] + b"\xff\xd0" + JPEG[2:],
    "a stray byte before the frame": JPEG[:2] + b"\0" + JPEG[2:],
    "a segment of no length": JPEG[:2] + b"\xff\xe0\0\0" + JPEG[2:],
    "a JPEG's beginning": JPEG[:2],
    "a PNG's beginning": GOOD["PNG"][:20],
    "BMP": encode(picture(), "BMP"),
    "GIF": encode(picture(), "GIF"),
    "TIFF": encode(picture(), "TIFF"),
    "WEBP": encode(picture(), "WEBP"),
    "PPM": encode(picture(), "PPM"),
    "a text": b"no image",
}


@pytest.mark.parametrize("name", BAD)
def test_bytes_of_another_size_or_format_are_not_decoded(name: str, tmp_path: Path) -> None:
    opened = written(tmp_path, BAD[name], 40, 56)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"c\.h5: image a/1\.png is no PNG or JPEG of the size .*: prepare it again"
        ):
            opened.encoded(0)


def test_a_size_that_preparation_would_shrink_is_not_believed(tmp_path: Path) -> None:
    assert cache.LONGEST == images.LONGEST
    with pytest.raises(UserError, match="no PNG or JPEG of the size"):
        written(tmp_path, png(4097, 1), 1, 4097).encoded(0)
    assert written(tmp_path, png(4096, 1), 1, 4096).encoded(0).size
