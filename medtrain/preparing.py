"""How a cache is made: by one process, from finished parts that wait in a folder, and never over another file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from medtrain.errors import UserError
from medtrain.files import remove_leftovers
from medtrain.lock import PATIENCE_S, locked

Opened = TypeVar("Opened")


def parts_of(out: Path) -> Path:
    """The folder where finished parts of a cache wait for the others."""
    return out.with_name(f"{out.name}.parts")


def make_once(out: Path, ready: Callable[[], bool], make: Callable[[], None]) -> Path:
    """Call `make` unless the cache `out` is `ready`, holding the lock of the folder of its parts, which is removed
    afterwards. Raises UserError where another process holds the lock; errors of `ready` and `make` leave the parts.
    """
    parts = parts_of(out)
    if not ready():
        with locked(parts, f"preparing {out.name}", PATIENCE_S):
            if not ready():  # another process may just have ended
                remove_leftovers(out.parent, out.name)
                make()
                shutil.rmtree(parts)
    return out


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
    raise UserError(f"{out} was made from another folder than {folder}: give another --out, or remove it first.")
