"""Checkpoints: written whole or not at all, read without running code from the file."""

import errno
import os
import pickle
import platform
import zipfile
from pathlib import Path
from typing import Any

import torch

from medtrain.errors import UserError
from medtrain.files import replacing

LAST, BEST = "checkpoint_last.pt", "checkpoint_best.pt"


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values atomically."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    with replacing(path) as temporary:
        try:
            torch.save({**content, "versions": versions}, temporary)
        except RuntimeError as error:
            # torch's file writer has no error of its own for a full disk or quota
            if "unexpected pos" in str(error) or "iostream" in str(error) or "PytorchStreamWriter" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
            raise


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; raises UserError where it is absent, damaged or holds anything but data."""
    if not path.is_file():
        raise UserError(f"{path} is not there: name the folder of a run that has trained.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile):
        raise UserError(f"{path} is damaged or no checkpoint of this program: remove it or copy it again.") from None
    if not isinstance(content, dict) or "model" not in content:
        raise UserError(f"{path} is no checkpoint of this program: name a run's own file.")
    return content


def load_model(model: torch.nn.Module, content: dict[str, Any], path: Path) -> None:
    """Load the weights strictly; a model of another shape is a UserError."""
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path} does not fit the recipe's model ({first[:120]}): use the run's own recipe.") from None
