"""Checkpoints: written whole or not at all, the one before kept, read without running code from the file."""

import errno
import os
import platform
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from medtrain.errors import Failed, UserError, out_of_memory
from medtrain.files import beside, replacing

LAST, PREVIOUS, BEST = "checkpoint_last.pt", "checkpoint_previous.pt", "checkpoint_best.pt"


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write tensors and plain values atomically; with `previous`, what `path` was before stays under that name."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    with replacing(path) as temporary:
        try:
            torch.save({**content, "versions": versions}, temporary)
        except RuntimeError as error:
            # torch's file writer has no error of its own for a full disk or quota
            if "unexpected pos" in str(error) or "iostream" in str(error) or "PytorchStreamWriter" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
            raise
        if previous and path.exists():
            _keep(path, previous)


def _keep(path: Path, previous: Path) -> None:
    """A second name for a file, so that there is a checkpoint under the first at every moment."""
    second = beside(previous)
    try:
        os.link(path, second)
    except OSError:  # a file system without links: for a moment there is the previous one only
        os.replace(path, previous)
        return
    os.replace(second, previous)
    second.unlink(missing_ok=True)  # stays where both were one file already, after a crash in between


def newest(run: Path) -> tuple[Path, str] | None:
    """(checkpoint to go on from, what is to be said of it) of a run folder, or None where it has none.

    A damaged newest one is set aside, and the one before is taken; raises UserError where both are damaged.
    """
    last, previous = run / LAST, run / PREVIOUS
    note = ""
    if last.exists():
        try:
            check(last)
            return last, note
        except UserError:
            if not previous.exists():
                raise
            aside = run / f"{last.stem}.damaged.pt"
            os.replace(last, aside)
            note = f"{last} is damaged: it was set aside as {aside.name}, the checkpoint before it is used"
    if not previous.exists():
        return None
    check(previous)
    return previous, note


def check(path: Path) -> None:
    """Compare every record of a checkpoint with its checksum, in bounded memory and time; raises UserError where it is
    damaged, Failed where the disk or network does not give it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch packs nothing: what unpacks to more than its own bytes was made to harm
            packed = sum(record.file_size for record in archive.infolist()) > path.stat().st_size
            damaged = "the file itself" if packed else archive.testzip()
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # a place that no file has
            raise Failed(f"{path} can not be read ({error.strerror}): run the same command again.") from None
        damaged = "the file itself"
    if damaged is not None:
        raise UserError(f"{path} is damaged or no checkpoint of this program: remove it or copy it again.")


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; raises UserError where it is absent, damaged or holds anything but data."""
    if not path.is_file():
        raise UserError(f"{path} is not there: name the folder of a run that has trained.")
    check(path)  # torch compares no checksum
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises whatever the bytes make it stumble over
        if out_of_memory(error):
            raise
        raise UserError(f"{path} is damaged or no checkpoint of this program: remove it or copy it again.") from None
    if not isinstance(content, dict) or "model" not in content:
        raise UserError(f"{path} is no checkpoint of this program: name a run's own file.")
    return content


def load_model(model: torch.nn.Module, content: dict[str, Any], path: Path) -> None:
    """Load the weights strictly; a model of another shape is a UserError."""
    try:
        take_weights(model, content["model"])
    except ValueError as error:
        raise UserError(f"{path} does not fit the recipe's model ({error}): use the run's own recipe.") from None


def take_weights(model: torch.nn.Module, weights: dict[str, Any]) -> None:
    """Load the weights strictly; raises ValueError with the first name or shape that is another one."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(first[:120]) from None
