"""NVIDIA's apex, where a recipe asks for its fused optimisers. The only file that imports apex."""

from collections.abc import Sequence
from typing import Any

import torch

from medtrain.errors import UserError
from medtrain.recipe import Optim

PLACE = "https://github.com/NVIDIA/apex"


def make_apex(optim: Optim, groups: Sequence[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """apex's FusedAdam (Adam or AdamW) or FusedSGD with the numbers of `strategy.make_optimizer`; raises UserError
    where they can not be had.
    """
    if device.type != "cuda":
        raise UserError("optim.library=apex needs a GPU: --set optim.library=torch.")
    try:
        import apex
    except ImportError:
        raise UserError(f"optim.library=apex needs NVIDIA's apex ({PLACE}), or --set optim.library=torch.") from None
    try:
        from apex.optimizers import FusedAdam, FusedSGD
    except ImportError as error:
        if not hasattr(apex, "amp") and "amp_C" not in str(error):
            words = "the package apex here is another one of that name (from PyPI), not NVIDIA's"
        else:
            words = f"apex is built without its CUDA extensions ({error})"
        raise UserError(f"{words}: build {PLACE}, or --set optim.library=torch.") from None
    if optim.name == "sgd":
        return FusedSGD(groups, lr=optim.lr, momentum=0.99, nesterov=True, weight_decay=optim.weight_decay)
    return FusedAdam(groups, lr=optim.lr, weight_decay=optim.weight_decay, adam_w_mode=optim.name == "adamw")
