"""torch.compile, and where what it makes is kept."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

COMPILED = ("on", "try", "graphs")  # ways of train.compile that ask torch.compile


def compiled(model: nn.Module, how: str = "on") -> Callable[..., Any]:
    """torch.compile, with what it makes kept in $TORCHINDUCTOR_CACHE_DIR, or in the home folder, for later jobs; with
    CUDA graphs where `how` is "graphs".
    """
    _choose_compiled_folder()
    return torch.compile(model, mode="reduce-overhead" if how == "graphs" else None)


def _choose_compiled_folder() -> None:
    """Keep what is compiled, Triton's kernels too, out of the folder below /tmp that torch would take: all users of the
    machine know its name, and the first to make it chooses the code that is loaded from there.
    """
    kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    # importing torch's compiler, as timm does and the first optimiser, puts torch's own choice into the environment
    if not kept or kept.startswith(os.path.join(tempfile.gettempdir(), "torchinductor_")):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_compiled_folder())
    # headers go there whatever that says; the setting is read at the import, which may lie behind
    wanted = os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
    from torch._inductor import config

    config.cpp_cache_precompile_headers = wanted == "1"


def _compiled_folder() -> Path:
    """In the home folder, or, where that can not be written to, one of this process alone, removed at its end."""
    with suppress(OSError, RuntimeError):  # the latter where there is no home
        home = Path("~/.cache/medtrain/compiled").expanduser()
        home.mkdir(parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    own = Path(tempfile.mkdtemp(prefix="medtrain-compiled-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own
