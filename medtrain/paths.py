"""Paths in data folders: which files lie there, and that none leads out."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from medtrain.errors import UserError
from medtrain.wording import shown

# What a spreadsheet takes for the beginning of a formula; a sign may stand before a number, so "-" is not among them.
FORMULA = ("=", "+", "@")
# No system takes a longer path.
MOST_PATH = 4096


def spelt(path: Path) -> str:
    """A path as it stands in a message: whole, in one line, and without what would steer a terminal."""
    return shown(path, MOST_PATH)


def is_formula(name: str) -> bool:
    """Whether a spreadsheet that opens a table would take a cell of this text for a formula."""
    return name.startswith(FORMULA)


def walk_files(folder: Path, passed_over: Callable[[str], bool], *, anywhere: bool = False) -> Iterator[Path]:
    """Files at or below a folder, in order, through links to folders, each folder once.

    Files and folders whose name is `passed_over` are left out. Raises UserError before it goes into a folder that lies
    elsewhere, unless links may lead `anywhere`.
    """
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        known = real in seen
        seen.add(real)
        folders[:] = [] if known else sorted(name for name in folders if not passed_over(name))
        for link in (Path(place) / name for name in folders if not anywhere):
            if link.is_symlink():
                stay_inside(folder, link)
        yield from () if known else (Path(place) / name for name in sorted(files) if not passed_over(name))


def follows_links() -> bool:
    """Whether links may lead out of a folder: MEDTRAIN_FOLLOW_LINKS=1 says so."""
    return os.environ.get("MEDTRAIN_FOLLOW_LINKS", "") == "1"


def escapes(root: Path, path: Path) -> bool:
    """Whether links lead out of `root` from a path that lies in it by its words, and may not."""
    if follows_links():
        return False
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def stay_inside(folder: Path, path: Path) -> None:
    """UserError where links lead out of the data folder."""
    if escapes(folder, path):
        raise UserError(
            f"{spelt(path)} is a link that leaves the data folder: copy what it points to, or allow links with "
            "MEDTRAIN_FOLLOW_LINKS=1."
        )


def origin(folder: Path) -> str:
    """Tells whether two things were made from one folder, and not which: a hash of its path."""
    return hashlib.blake2b(os.fsencode(os.path.realpath(folder)), digest_size=8).hexdigest()
