"""Names, dates, places and thumbnails of image files reach no cache, and the pixels stay."""

import io
from pathlib import Path

import numpy as np
import pytest
from picture_files import encode, picture
from PIL import Image, ImageOps, PngImagePlugin

from medcls import images
from medcls.cache import ImageCache
from medcls.metadata import without_metadata
from medcls.preparation import prepare_folder

SECRET = "Margarete Musterfrau"


def spoken_jpeg(orientation: int = 1, **options: object) -> bytes:
    """A JPEG that names somebody in EXIF, a comment, a colour profile and after its end."""
    exif = Image.Exif()
    exif[0x0112], exif[0x013B], exif[0x010E], name = orientation, SECRET, SECRET, SECRET.encode()
    xmp = f"<x:xmpmeta>{SECRET}</x:xmpmeta>".encode()
    return encode(picture(), "JPEG", exif=exif, comment=name, icc_profile=name, xmp=xmp, **options) + name


def spoken_png() -> bytes:
    """A PNG that names somebody in its texts and EXIF."""
    info, exif = PngImagePlugin.PngInfo(), Image.Exif()
    info.add_text("PatientName", SECRET)
    info.add_itxt("Description", SECRET, zip=False)
    info.add(b"prVt", SECRET.encode())
    exif[0x010E] = SECRET
    colour = picture().convert("P").getpixel((0, 0))
    return encode(picture().convert("P"), "PNG", pnginfo=info, exif=exif, transparency=colour)


def with_segments(content: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with segments of a marker and a content after its start."""
    made = [b"\xff" + bytes([marker]) + (len(body) + 2).to_bytes(2) + body for marker, body in segments]
    return b"".join([content[:2], *made, content[2:]])


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGBA"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 5, "restart_marker_blocks": 1}], ids=str)
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_jpeg_keeps_its_pixels_and_its_orientation_only(orientation: int, options: dict[str, object]) -> None:
    content = spoken_jpeg(orientation, **options)
    assert content.count(SECRET.encode()) >= 5
    made = images.examine(content)
    assert made.converted == ""
    assert SECRET.encode() not in made.encoded
    assert np.array_equal(pixels(made.encoded), pixels(content))
    exif = Image.open(io.BytesIO(made.encoded)).getexif()
    assert dict(exif) == ({} if orientation == 1 else {0x0112: orientation})


def test_a_png_keeps_its_pixels_and_its_transparency_only() -> None:
    content = spoken_png()
    assert content.count(SECRET.encode()) >= 3
    made = images.examine(content)
    assert made.converted == ""
    assert SECRET.encode() not in made.encoded
    assert np.array_equal(pixels(made.encoded), pixels(content))
    assert (pixels(made.encoded)[..., 3] < 255).any()


def test_of_adobes_segments_only_what_tells_the_colours_is_kept() -> None:
    colours = b"Adobe\0\x64\0\0\0\0\x01"
    photoshop = b"Adobe_CM\0" + SECRET.encode()  # IPTC's names lie in APP13
    content = encode(picture(), "JPEG")
    spoken = with_segments(content, (0xED, photoshop), (0xEE, colours + SECRET.encode()), (0xE9, photoshop))
    made = images.examine(spoken)
    assert made.converted == ""
    assert SECRET.encode() not in made.encoded
    assert b"Adobe_CM" not in made.encoded
    assert b"\xff\xee\0\x0e" + colours + b"\xff" in made.encoded
    assert np.array_equal(pixels(made.encoded), pixels(spoken))
    short = without_metadata(with_segments(content, (0xEE, colours[:-1])), "JPEG")  # which no decoder heeds
    assert b"Adobe" not in short
    assert without_metadata(made.encoded, "JPEG") == made.encoded


def test_the_colours_of_adobes_rgb_stay() -> None:
    content = with_segments(encode(picture(), "JPEG", keep_rgb=True), (0xEE, b"Adobe\0\x64" + bytes(5) + b"more"))
    made = images.examine(content)
    assert b"more" not in made.encoded
    assert np.array_equal(pixels(made.encoded), pixels(content))


def test_an_orientation_that_only_xmp_tells_is_kept() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'
    content = encode(picture(), "JPEG", xmp=xmp)
    made = images.examine(content)
    assert made.size == picture().size
    assert np.array_equal(pixels(made.encoded), pixels(content))
    assert Image.open(io.BytesIO(made.encoded)).getexif()[0x0112] == 6


def test_a_file_that_opens_and_yet_is_built_oddly_becomes_png(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medcls.metadata.SOS", 0xC7)  # so that no scan is found
    made = images.examine(spoken_jpeg())
    assert made.converted == "no marker where one must be"
    stored = Image.open(io.BytesIO(made.encoded))
    assert stored.format == "PNG"
    assert stored.info == {}


def test_what_is_no_jpeg_or_png_is_refused() -> None:
    whole = encode(picture(), "JPEG")
    for broken, words in ((whole[:30], "cut short"), (b"\xff\xd8\x00", "no marker"), (b"", "no start")):
        with pytest.raises(ValueError, match=words):
            without_metadata(broken, "JPEG")
    with pytest.raises(ValueError, match="damaged"):
        without_metadata(encode(picture())[:-1], "PNG")


def test_a_cache_holds_no_metadata(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / "0.jpg").write_bytes(spoken_jpeg(6))
        (tmp_path / "data" / label / "1.png").write_bytes(spoken_png())
    out = prepare_folder(tmp_path / "data", tmp_path / "c.h5")
    assert SECRET.encode() not in out.read_bytes()
    cache = ImageCache(out)
    assert len(cache.ids) == 4
    cache.close()
