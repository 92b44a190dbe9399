"""Whose label maps lie in a folder: several calls may fill it, but not with answers of different members."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medseg.kept import digest
from medtrain.checkpoint import BEST
from medtrain.errors import UserError
from medtrain.files import beside, file_stamp, read_json, write_json
from medtrain.run_folder import DONE

NAME = "members.json"


@contextmanager
def claimed(out: Path, runs: Sequence[Path], weights: Sequence[float], codes: str = "") -> Iterator[None]:
    """Label maps written inside are those of these members, in `codes`: `members.json` in `out` says so from now on,
    unless none comes of it. Raises UserError where that file names others, also of a call that runs at the same time.
    """
    fresh = not out.exists()
    told = {"members": [run.name for run in runs], "weights": list(weights), "codes": codes}
    told["key"] = digest([told, [_trained(run) for run in runs]])
    first = _write_first(out / NAME, told)
    if not first and read_json(out / NAME).get("key") != told["key"]:
        raise UserError(f"{out} holds label maps of other members (see {NAME} there): give another --out.")
    try:
        yield
    finally:
        if first and not any(out.glob("*.nii.gz")):
            (out / NAME).unlink(missing_ok=True)
            if fresh and not any(out.iterdir()):
                out.rmdir()


def _trained(run: Path) -> Any:
    """What tells a run from another training of the same recipe, wherever its folder lies."""
    done = run / DONE
    return hashlib.blake2b(done.read_bytes(), digest_size=8).hexdigest() if done.is_file() else file_stamp(run / BEST)


def _write_first(path: Path, value: Any) -> bool:
    """Write a JSON file that is whole from the first moment on, unless there is one; tells whether it did."""
    if path.exists():
        return False
    temporary = beside(path)
    write_json(temporary, value)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links, where two calls at once may both be first
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True
