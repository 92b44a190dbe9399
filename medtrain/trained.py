"""What a run leaves for prediction, read with suspicion: it may come from anywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medtrain import checkpoint
from medtrain.errors import UserError
from medtrain.recipe import Recipe
from medtrain.strategy import Forward, inference


def default_device() -> torch.device:
    """Where one process predicts: the first GPU that it can use, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_best(run: Path, **kinds: Any) -> tuple[Path, dict[str, Any]]:
    """(path, content) of a run's checkpoint_best.pt, whose entries are of these types beside `model` (finite tensors by
    name), `recipe` (JSON) and `preparation` (a dictionary); raises UserError.
    """
    path = run / checkpoint.BEST
    content = checkpoint.load(path)
    for name, kind in {"model": dict, "recipe": str, "preparation": dict, **kinds}.items():
        if not isinstance(content.get(name), kind):
            raise UserError(f"{path} is a checkpoint of another task or version ({name}): name a run of this task.")
    check_tensors(path, content["model"])
    return path, content


def restored(path: Path, content: dict[str, Any], recipe: Recipe, build: Callable[[], nn.Module],
             device: torch.device) -> Forward:  # fmt: skip
    """The network that `build` makes, with the weights of `read_best`, ready to predict; raises UserError."""
    try:
        model = build()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    checkpoint.load_model(model, content, path)
    return inference(model, recipe, device)


def check_tensors(path: Path, tensors: dict[Any, Any]) -> None:
    """Raise UserError unless these, from a file, are finite tensors by name, none larger than its bytes there."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise UserError(f"{path} holds no tensors by name: remove it or copy it again.")
        # elements may share their bytes or have none: whatever looks at each would take gigabytes for a small file
        if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path} holds a tensor that is larger than its bytes: remove it or copy it again.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path} holds weights that are no numbers: train it again with a lower optim.lr.")
