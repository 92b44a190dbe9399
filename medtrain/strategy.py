"""How gradients become steps: alone or over ranks, in mixed precision."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medtrain.distributed import Ranks
from medtrain.errors import UserError
from medtrain.recipe import Optim, Recipe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def precision_for(recipe: Recipe, device: torch.device) -> str:
    """`auto` is bf16 where the hardware computes it natively, else fp16 on a GPU and fp32 on a CPU."""
    wanted = recipe.train.precision
    if wanted == "fp16" and device.type == "cpu":
        raise UserError("train.precision=fp16 needs a GPU: take bf16, fp32 or auto.")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.backends.cpu.get_cpu_capability() == "AVX512" and _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


def make_optimizer(optim: Optim, parameters: Iterable[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """Adam (L2), AdamW (decoupled) or SGD with Nesterov momentum 0.99; fused where the device has it."""
    fused = device.type in ("cuda", "cpu")
    if optim.name == "sgd":
        return torch.optim.SGD(
            parameters, optim.lr, momentum=0.99, nesterov=True, weight_decay=optim.weight_decay, fused=fused
        )
    kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    return kind(parameters, optim.lr, weight_decay=optim.weight_decay, fused=fused)


class Single:
    """One process: autocast, loss scaling for fp16, clipping, the optimiser's step."""

    def __init__(self, model: nn.Module, recipe: Recipe, ranks: Ranks):
        self.precision = precision_for(recipe, ranks.device)
        self.device = ranks.device
        self.clip_norm = recipe.optim.clip_norm
        self.model = model.to(ranks.device)
        self.optimizer = make_optimizer(recipe.optim, self.model.parameters(), ranks.device)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.precision == "fp16")
        self.wrapped: nn.Module = self.model

    def autocast(self) -> AbstractContextManager[Any]:
        """The mixed-precision context of forward and loss."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])

    def accumulating(self) -> AbstractContextManager[Any]:
        """The context of a backward pass whose gradients are not yet complete."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradients."""
        self.scaler.scale(loss).backward()

    def step(self, lr: float) -> None:
        """Clip, update the weights, and clear the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, on the same or another number of ranks."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take `state`'s values back."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():  # empty where the run went on from bf16 to fp16
            self.scaler.load_state_dict(state["scaler"])


class Ddp(Single):
    """Several processes with equal weights; gradients are averaged while they are computed."""

    def __init__(self, model: nn.Module, recipe: Recipe, ranks: Ranks):
        super().__init__(model, recipe, ranks)
        ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        self.wrapped = DistributedDataParallel(self.model, device_ids=ids, gradient_as_bucket_view=True)

    def accumulating(self) -> AbstractContextManager[Any]:
        return self.wrapped.no_sync()  # type: ignore[operator]


def make_strategy(model: nn.Module, recipe: Recipe, ranks: Ranks) -> Single:
    """`auto` is Ddp when there are several ranks."""
    wanted = recipe.train.strategy
    if wanted == "single" and ranks.world > 1:
        raise UserError(f"train.strategy=single can not use {ranks.world} processes: take auto or ddp.")
    return (Ddp if ranks.world > 1 else Single)(model, recipe, ranks)
