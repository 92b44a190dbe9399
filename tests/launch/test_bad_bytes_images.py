"""Damaged and hostile images: set aside by name, or with --strict one sentence and exit code 2."""

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hostile import chunk, png
from launch_helpers import check_refused, in_this_process, run_main
from PIL import Image

from medcls.cache import ImageCache

Make = Callable[[Path], object]


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def photo(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """An image with something on it."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


JPEG, PNG = encoded(photo(), "JPEG"), encoded(photo(), "PNG")


def content(value: bytes) -> Make:
    return lambda path: path.write_bytes(value)


def jpeg_size(width: int, height: int) -> bytes:
    """The JPEG with another size in its header."""
    at = JPEG.index(b"\xff\xc0")
    return JPEG[: at + 5] + struct.pack(">HH", height, width) + JPEG[at + 9 :]


def link(path: Path) -> None:
    """The file is a link to an image out of the data folder."""
    aside = path.parents[3] / "elsewhere.jpg"
    aside.write_bytes(JPEG)
    path.symlink_to(aside)


BAD: dict[str, tuple[Make, str]] = {
    "empty": (content(b""), "empty file"),
    "one byte": (content(b"\xff"), "not an image"),
    "a text": (content(b"an image"), "not an image"),
    "half a JPEG": (content(JPEG[: len(JPEG) // 2]), "truncated"),
    "half a PNG": (content(PNG[: len(PNG) // 2]), "truncated|broken|cut"),
    "a JPEG's head": (content(JPEG[:30]), "."),
    "a PNG's head": (content(PNG[:33]), "."),
    "a PNG without pixels": (content(png(9, 9, rows=b"")), "."),
    "a PNG with a wrong checksum": (content(PNG[:50] + bytes([PNG[50] ^ 1]) + PNG[51:]), "."),
    "a PNG of no width": (content(png(0, 9, rows=b"")), "."),
    "a PNG of 10^10 pixels": (content(png(100_000, 100_000, rows=b"")), "megapixels"),
    "a PNG of 2^62 pixels": (content(png(2**31 - 1, 2**31 - 1, rows=b"")), "."),
    "a JPEG of 65535 x 65535": (content(jpeg_size(65535, 65535)), "megapixels"),
    "a JPEG of no height": (content(jpeg_size(40, 0)), "."),
    "a PNG with a text of a gigabyte": (
        content(png(9, 9, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26), 9)), rows=b"")), "."),
    "a PNG with a profile of gigabytes": (
        content(png(9, 9, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 26), 9)), rows=b"")), "."),
    "PostScript": (content(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"), "not an image"),
    "an icon": (content(encoded(photo(), "ICO")), "not an image"),
    "a PDF": (content(encoded(photo(), "PDF")), "not an image"),
    "an HDF5 file": (content(b"\x89HDF\r\n\x1a\n" + bytes(600)), "not an image"),
    "a broken link": (lambda path: path.symlink_to(path.with_name("none")), "No such file"),
    "a link to itself": (lambda path: path.symlink_to(path), "symbolic links"),
    "a link that leaves": (link, "leaves the data folder"),
    "a pipe": (os.mkfifo, "no regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "leaves the data folder|no regular file"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medcls.preparation.in_processes", in_this_process)


def folder(place: Path) -> Path:
    """Two classes of two images."""
    for name in ("a", "b"):
        (place / "X" / name).mkdir(parents=True)
        for n in range(2):
            image = photo(size=(40 + n, 30 + len(list(place.rglob("*.png")))))
            (place / "X" / name / f"{n}.png").write_bytes(encoded(image, "PNG"))
    return place


def prepare(data: Path, out: Path, *options: str) -> int:
    return run_main("prepare", "multicancer", "--data", data, "--out", out / "c.h5", "--workers", 1, *options)


@pytest.mark.parametrize("name", BAD)
def test_strict(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, words = BAD[name]
    data, out = folder(tmp_path / "data"), tmp_path / "out"
    make(data / "X" / "a" / "bad.jpg")
    code = prepare(data, out, "--strict")
    told = capfd.readouterr().err
    for part in out.rglob("*.h5"):  # what was examined before stays for the next call
        assert part.parent.name == "c.h5.parts"
        part.unlink()
    check_refused(code, told, str(data / "X" / "a" / "bad.jpg"), words, out)


def test_set_aside(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = folder(tmp_path / "data")
    for n, (make, _) in enumerate(BAD.values()):
        make(data / "X" / "a" / f"bad{n:02}.jpg")
    assert prepare(data, tmp_path) == 0
    told = capfd.readouterr().err
    assert "Traceback" not in told
    assert all(f"set aside: X/a/bad{n:02}.jpg: " in told for n in range(20))
    cache = ImageCache(tmp_path / "c.h5")
    assert len(cache.ids) == 4
    assert len(cache.facts["bad"]) == len(BAD)


ODD = {
    "one pixel": encoded(photo(size=(1, 1)), "PNG"),
    "one pixel high": encoded(photo(size=(100_000, 1)), "PNG"),
    "one pixel wide": encoded(photo(size=(1, 5000)), "JPEG"),
    "16 bits": encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"),
    "one bit": encoded(photo("1"), "PNG"),
    "palette": encoded(photo("P"), "PNG"),
    "CMYK": encoded(photo("CMYK"), "JPEG"),
    "animated": encoded(photo(), "GIF", save_all=True, append_images=[photo(size=(20, 20))] * 3),
    "animated PNG": encoded(photo(), "PNG", save_all=True, append_images=[photo()] * 3),
    "several pages": encoded(photo(), "TIFF", save_all=True, append_images=[photo()] * 3),
    "garbage after the end": JPEG + b"garbage",
    "a PNG called JPEG": PNG,
}


def test_odd_but_usable(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = folder(tmp_path / "data")
    for n, image in enumerate(ODD.values()):
        (data / "X" / "a" / f"odd{n:02}.jpg").write_bytes(image)
    assert prepare(data, tmp_path) == 0
    assert capfd.readouterr().err == ""
    cache = ImageCache(tmp_path / "c.h5")
    assert len(cache.ids) == 4 + len(ODD)
    for n in range(len(cache.ids)):
        height, width = cache.size[n]
        assert Image.open(io.BytesIO(cache.encoded(n).tobytes())).size == (width, height)


def bad_name(place: Path) -> None:
    os.close(os.open(os.fsencode(place / "X" / "a") + b"/\xff.png", os.O_CREAT))


def class_outside(place: Path) -> None:
    (place / "X" / "a").rename(place.parent / "elsewhere")
    (place / "X" / "a").symlink_to(place.parent / "elsewhere")


FOLDERS: dict[str, tuple[Make, str]] = {
    "a file whose name is not UTF-8": (bad_name, "not UTF-8"),
    "a file with a line break": (lambda d: (d / "X" / "a" / "x\ny.png").write_bytes(PNG), "name"),
    "a class with a line break": (lambda d: (d / "X" / "a").rename(d / "X" / "a\nb"), "name"),
    "a class that is not UTF-8": (lambda d: os.rename(d / "X" / "a", os.fsencode(d / "X") + b"/\xff"), "name"),
    "a class that is a link that leaves": (class_outside, "leaves the data folder"),
    "a class without images": (lambda d: [p.unlink() for p in (d / "X" / "a").iterdir()], "is empty"),
    "one class": (lambda d: shutil.rmtree(d / "X" / "a"), "one class only"),
    "nested too deep": (lambda d: (d / "X" / "a" / "b" / "c" / "d").mkdir(parents=True), "nested|class folders"),
    "a class of damaged images": (lambda d: [p.write_bytes(b"x") for p in (d / "X" / "a").iterdir()], "can be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, words = FOLDERS[name]
    data, out = folder(tmp_path / "data"), tmp_path / "out"
    change(data)
    code = prepare(data, out)
    told = "\n".join(line for line in capfd.readouterr().err.splitlines() if not line.startswith("set aside"))
    for part in out.rglob("*.h5"):
        part.unlink()
    check_refused(code, told, str(data), words, out)


PARTS: dict[str, Callable[[Any], object]] = {
    "no bytes": lambda file: file.__delitem__("bytes"),
    "facts that are no JSON": lambda file: file["facts"].__setitem__(0, 0),
    "lengths beyond": lambda file: file["length"].__setitem__(slice(None), 10**9),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_damaged_part_is_made_anew(name: str, tmp_path: Path) -> None:
    data = folder(tmp_path / "data")
    (data / "X" / "a" / "bad.jpg").write_bytes(b"x")
    assert prepare(data, tmp_path, "--strict") == 2
    (part,) = (tmp_path / "c.h5.parts").glob("*.h5")
    with h5py.File(part, "r+") as file:
        PARTS[name](file)
    assert prepare(data, tmp_path) == 0
    assert all(intact for _, intact in ImageCache(tmp_path / "c.h5").verify())
