"""Files that are either whole or absent: written beside their place, flushed, then renamed."""

import errno
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medtrain.errors import UserError, disk_full

# Of a listing or plan; one of ten thousand members has 20 MB.
MOST_JSON = 64 << 20


def beside(path: Path) -> Path:
    """A temporary name beside `path` that no other writer takes: on other nodes and in containers the numbers of
    processes are the same ones.
    """
    # the suffix stays at the end: nibabel and h5py look at it
    return path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.{path.name}")


@contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it is flushed to disk and renamed to `path`, else removed.

    Without `flush` it is renamed only: for what matters just now, or can be made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        try:
            yield temporary
        except (OSError, RuntimeError) as error:
            if disk_full(error):  # with the path, which libraries leave out
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
            raise
        if flush:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if not flush:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove the temporary files of killed writers, all or those of one file; for who alone writes there."""
    for path in folder.glob(".*"):
        if re.fullmatch(rf"\.\d+(-[0-9a-f]{{8}})?\.{re.escape(name) or '.*'}", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def file_stamp(path: Path) -> tuple[int, int]:
    """Size and time of writing of a file, which tell whether it is still the same; zeros where it is not there."""
    try:
        about = path.stat()
    except OSError:
        return 0, 0
    return about.st_size, about.st_mtime_ns


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def parse_json(path: Path) -> Any:
    """The value in a JSON file; raises ValueError for anything else, however large, deep or oddly coded."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_JSON + 1)
    except OSError as error:
        raise ValueError(error.strerror or "it can not be read") from None
    if len(content) > MOST_JSON:
        raise ValueError(f"more than {MOST_JSON >> 20} MB")
    return parse_json_text(content.decode("utf-8-sig"))  # some editors mark UTF-8


def parse_json_text(text: str) -> Any:
    """The value of a JSON text; raises ValueError."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if "\\ud" in text.lower():  # halves of a character can be neither printed nor written
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that this program wrote; raises UserError where it is absent or damaged."""
    try:
        value = parse_json(path)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is absent or damaged: take it from an intact copy, or remove its folder.")
    return value
