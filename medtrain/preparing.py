"""How a cache is made: by one process, from finished parts that wait in a folder, and never over another file."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from medtrain.errors import UserError
from medtrain.files import remove_leftovers
from medtrain.lock import NAME as LOCK
from medtrain.lock import PATIENCE_S, locked
from medtrain.paths import spelt

Opened = TypeVar("Opened")


def parts_of(out: Path) -> Path:
    """The folder where finished parts of a cache wait for the others."""
    return out.with_name(f"{out.name}.parts")


def make_once(out: Path, ready: Callable[[], bool], make: Callable[[], None]) -> Path:
    """Call `make` unless the cache `out` is `ready`, holding the lock of the folder of its parts, which is removed
    afterwards. Raises UserError where another process holds the lock, or where somebody else may have left parts;
    errors of `ready` and `make` leave the parts.
    """
    parts = parts_of(out)
    if not ready():
        _refuse_planted(parts)  # before a lock is written there
        with locked(parts, f"preparing {out.name}", PATIENCE_S):
            _close_to_others(parts)
            if not ready():  # another process may just have ended
                remove_leftovers(out.parent, out.name)
                make()
                for path in parts.iterdir():
                    if path.name != LOCK:  # it goes last: another process may be waiting for it
                        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process holds it now, or is about to look
            parts.rmdir()
    return out


def _close_to_others(parts: Path) -> None:
    """From now on only this user can put parts there; raises UserError where another already has."""
    with contextlib.suppress(OSError):  # a file system without modes
        parts.chmod(0o700)
    _refuse_planted(parts)


def _refuse_planted(parts: Path) -> None:
    """Raise UserError where the folder of the parts, or a file in it, is a link or another user's: parts become the
    cache, and could lead there what only this user may read.
    """
    _refuse_strange([parts])
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # the lock tells what is wrong with another thing
        _refuse_strange(list(parts.iterdir()))


def _refuse_strange(paths: Sequence[Path]) -> None:
    """Raise UserError where one of some paths in one folder is a link or another user's."""
    found = {path: about for path in paths if (about := _about(path))}
    for path, about in found.items():
        if stat.S_ISLNK(about.st_mode):
            raise UserError(f"{spelt(path)} is a link, where only parts of a cache may lie: remove it.")
    strange = [path for path, about in found.items() if about.st_uid != os.getuid()]
    owner = _owner_shown(strange[0].parent) if strange else None
    for path in strange:
        if found[path].st_uid != owner:
            raise UserError(f"{spelt(path)} belongs to another user: let that one's preparation end, then remove it, "
                            "or give another --out.")  # fmt: skip


def _about(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _owner_shown(folder: Path) -> int:
    """Whose this user's files are said to be in a folder: some network disks give them to one number for all."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_uid


def existing(out: Path, kind: Callable[[Path], Opened]) -> Opened | None:
    """The cache that is there, None where nothing is; raises UserError where it is anything else."""
    if not out.exists():
        return None
    try:
        return kind(out)
    except UserError as error:
        reason = str(error).removeprefix(str(out)).partition(":")[0].strip()
        raise UserError(f"{out} {reason}, so it is not overwritten: remove it or give another --out.") from None


def say_outdated(out: Path) -> None:
    """Print why an existing cache is made again."""
    print(f"note: {out} is older than the data or the options: it is made again", flush=True)


def refuse_other(out: Path, folder: Path) -> None:
    """Raise UserError: the cache that is there is of other data."""
    raise UserError(f"{out} was made from another folder than {spelt(folder)}: give another --out, or remove it first.")
