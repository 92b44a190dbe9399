"""JPEG and PNG files without what they say beside the picture: names, dates, places and thumbnails stay out of caches.

The pixels are not touched: only segments (JPEG, ITU-T T.81, annex B) or chunks (PNG, ISO/IEC 15948, 5.3) are left out.
"""

import re
import struct
import zlib
from collections.abc import Iterator

SOS, EOI, APP0, APP1, APP14, APP15, COM = 0xDA, 0xD9, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
# Of Adobe's APP14 (technical note 5116): its name, version, two flags, and the colours, which a decoder needs.
ADOBE = 12
BARE = (0x01, *range(0xD0, 0xD9))  # markers without a segment: TEM, RST0 to RST7, SOI
MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")  # ends a scan's entropy-coded bytes
PNG_HEAD = b"\x89PNG\r\n\x1a\n"
# Beside the critical ones: what a decoder may need for colours and transparency.
PNG_KEPT = (b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"pHYs", b"hIST")


def without_metadata(content: bytes, kind: str, orientation: int = 1) -> bytes:
    """The same picture of `kind` JPEG or PNG with its orientation (EXIF, 1 to 8) and no other metadata.

    Raises ValueError where the file is not built as its standard says.
    """
    return _jpeg(content, orientation) if kind == "JPEG" else _png(content)


def _jpeg(content: bytes, orientation: int) -> bytes:
    if content[:2] != b"\xff\xd8":
        raise ValueError("no start of a JPEG")
    kept, at, exif = [content[:2]], 2, b"" if orientation in (0, 1) else _exif(orientation)
    while True:
        start = at
        while content[at : at + 1] == b"\xff":  # any number of fill bytes
            at += 1
        if at == start or at >= len(content):
            raise ValueError("no marker where one must be")
        marker, at = content[at], at + 1
        if marker == EOI:  # what follows it, such as a second picture, is no part of the first
            return b"".join([*kept, b"\xff\xd9"])
        if marker in BARE:
            continue
        length = int.from_bytes(content[at : at + 2])
        segment, at = content[at + 2 : at + length], at + length
        if length < 2 or at > len(content):
            raise ValueError("a segment is cut short")
        if marker == APP0 and segment.startswith(b"JFIF\0") and len(segment) >= 14:
            segment = segment[:12] + b"\0\0"  # no thumbnail
        elif marker == APP14 and segment.startswith(b"Adobe") and len(segment) >= ADOBE:
            segment = segment[:ADOBE]
        elif marker == COM or APP0 <= marker <= APP15:
            continue
        if exif and marker != APP0:
            kept.append(exif)
            exif = b""
        kept.append(b"\xff" + bytes([marker]) + struct.pack(">H", len(segment) + 2) + segment)
        if marker == SOS:
            end = MARKER.search(content, at)
            if end is None:
                raise ValueError("a scan has no end")
            kept.append(content[at : end.start()])
            at = end.start()


def _exif(orientation: int) -> bytes:
    """An APP1 segment with the orientation alone (Exif 2.3, 4.6.4, tag 0x0112)."""
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    body = b"Exif\0\0" + b"MM\0*" + struct.pack(">IH", 8, 1) + entry + struct.pack(">I", 0)
    return b"\xff" + bytes([APP1]) + struct.pack(">H", len(body) + 2) + body


def _png(content: bytes) -> bytes:
    # bit 5 tells what is not critical
    kept = (chunk for name, chunk in png_chunks(content) if not name[0] & 0x20 or name in PNG_KEPT)
    return b"".join([PNG_HEAD, *kept])


def png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, chunk with its length, name and checksum) up to the last; raises ValueError where one is damaged."""
    if not content.startswith(PNG_HEAD):
        raise ValueError("no start of a PNG")
    name, at = b"", len(PNG_HEAD)
    while name != b"IEND":
        length, name = int.from_bytes(content[at : at + 4]), content[at + 4 : at + 8]
        chunk, at = content[at : at + 12 + length], at + 12 + length
        if len(chunk) < 12 + length or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
            raise ValueError("a chunk is damaged")
        yield name, chunk
