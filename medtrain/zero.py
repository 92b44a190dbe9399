"""DeepSpeed's ZeRO: optimiser, gradients or parameters shared out over ranks. The only file that imports DeepSpeed.

What is saved is put together and plain, in the form of one process, so that any number of ranks goes on with it.
"""

import copy
import itertools
import logging
import math
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from medtrain import checkpoint, distributed
from medtrain.distributed import Ranks
from medtrain.errors import Failed, UserError
from medtrain.precision import precision_for
from medtrain.recipe import Recipe
from medtrain.settings import check_deepspeed, configuration
from medtrain.strategy import Group, Single

# The states of an optimiser that have a parameter's shape.
STATES = {"adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


class DeepSpeed(Single):
    """Several processes under DeepSpeed, with the same optimisers, precision and checkpoints as the other strategies.

    A step whose loss is not finite on any rank is skipped. With accumulation, or where only the gradients are not
    finite, nothing can be taken back: then `Failed` is raised.
    """

    shards = True
    lays_weights = False  # DeepSpeed makes flat tensors of them

    def __init__(self, model: nn.Module, groups: Sequence[Group], recipe: Recipe, ranks: Ranks):
        check_deepspeed(recipe, precision_for(recipe, ranks.device))
        deepspeed = _library(ranks)
        super().__init__(model, groups, recipe, ranks)
        self._order = [parameter for group in groups for parameter in group["params"]]
        self._sizes = [len(group["params"]) for group in groups]
        self._fixed = False  # whether the network that is evaluated holds given weights
        self.stage = recipe.train.zero
        self.accumulates = recipe.train.accumulate > 1
        self.states = STATES[recipe.optim.name]
        # what evaluates where ranks share the weights out: in the host's memory while they train
        self.plain = copy.deepcopy(self.model).cpu() if self.stage == 3 else self.model
        if self.stage:
            self.optimizer.state.clear()  # of the whole parameters; the parts get their own below
        self.engine, self.inner, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=configuration(recipe, ranks.world, self.precision),
            dist_init_required=False,
        )  # fmt: skip
        self.wrapped = self.called = self.engine
        self._boundary, self._skipped = True, False
        if self.stage:
            self._prepare_states()

    def _prepare_states(self) -> None:
        """Zeros for the states of every part, which torch makes at the first step only: so they can be loaded."""
        for part in self._parts():
            made: dict[str, Any] = {name: torch.zeros_like(part) for name in self.states}
            if "exp_avg" in made:
                made["step"] = torch.zeros((), device=part.device)
            self.optimizer.state[part] = made
        if self.stage < 3:
            self.inner._lazy_init_hp_params_optimizer_state()

    def _parts(self) -> list[torch.Tensor]:
        """The flat fp32 tensors of this rank that the optimiser moves."""
        name = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self.inner, name))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        # in mixed precision by its own settings
        return self.engine(inputs.contiguous(memory_format=self.layout)).float()

    def evaluated(self) -> nn.Module:
        """The unsharded network; stage 3 gathers its weights for it, so every rank must call this."""
        if self.stage == 3 and not self._fixed:
            self.plain.load_state_dict(self.weights())
        return self.plain.to(self.device)

    def train_mode(self) -> None:
        if self.stage == 3:
            self.plain.cpu()
        super().train_mode()

    def accumulating(self) -> AbstractContextManager[Any]:
        self._boundary = False
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        if distributed.any_rank(not math.isfinite(float(loss.detach()))):
            self._skipped = True
            if self.accumulates:
                raise Failed("the loss was not finite, and DeepSpeed's accumulated gradients can not be taken back: "
                             "lower optim.lr or set optim.clip_norm")  # fmt: skip
            return
        self.engine.set_gradient_accumulation_boundary(is_boundary=self._boundary)
        self.engine.backward(loss, scale_wrt_gas=False)
        if not self._boundary:
            self.engine.step()  # only counts
            self._boundary = True

    def step(self, lr: float) -> torch.Tensor:
        skipped = torch.tensor(float(self._skipped), device=self.device)
        if not self._skipped:
            for group in self.inner.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
            if norm is not None and not math.isfinite(float(norm)):
                raise Failed(f"the gradients were not finite (norm {float(norm)}), and DeepSpeed has moved the weights "
                             "by them: lower optim.lr or set optim.clip_norm; the last checkpoint is good")  # fmt: skip
        self._skipped = False
        self.statistics.roll_back_if(skipped)
        return skipped

    def freeze(self, epoch: float) -> bool:
        return super().freeze(epoch) if self.stage == 0 else False

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole network's state_dict, on every rank; collective."""
        if self.stage < 3:
            return self.model.state_dict()
        whole = dict(self.plain.state_dict())  # its order
        own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name in whole:
            with _whole(own[name]):
                whole[name] = own[name].detach().cpu().clone()
        return whole

    def take_weights(self, content: dict[str, Any], path: Path) -> None:
        checkpoint.load_model(self.plain, content, path)
        self._fixed = True

    def state(self) -> dict[str, Any]:
        """As `Single.state`, put together from all ranks; collective."""
        if self.stage == 0:
            return super().state()
        from deepspeed.utils import safe_get_full_optimizer_state

        step = next((self.optimizer.state[part]["step"] for part in self._parts() if "exp_avg" in self.states), None)
        states: dict[int, dict[str, Any]] = {}
        for n, parameter in enumerate(self._order):
            states[n] = {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in self.states}
            if step is not None:
                states[n]["step"] = step.clone()
        ends = list(itertools.accumulate(self._sizes))
        groups = [{**group, "params": list(range(end - size, end))} for group, size, end in
                  zip(self.inner.param_groups, self._sizes, ends, strict=True)]  # fmt: skip
        return {"model": self.weights(), "optimizer": {"state": states, "param_groups": groups}, "scaler": {}}

    def load(self, state: dict[str, Any]) -> None:
        if self.stage == 0:
            super().load(state)
            return
        known = {name: value.shape for name, value in self.plain.state_dict().items()}
        if {name: value.shape for name, value in state["model"].items()} != known:
            raise ValueError("its weights have other names or shapes")
        own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, value in state["model"].items():
            with torch.no_grad(), _whole(own[name], writes=True):
                own[name].copy_(value)
        self.statistics.loaded()
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for n, parameter in enumerate(self._order):
            self._set(parameter, state["model"][names[id(parameter)]], None)
            for name in self.states:
                self._set(parameter, state["optimizer"]["state"][n][name], name)
        for part in self._parts():
            if "step" in self.optimizer.state[part]:
                self.optimizer.state[part]["step"].copy_(state["optimizer"]["state"][0]["step"])

    def _set(self, parameter: nn.Parameter, value: torch.Tensor, key: str | None) -> None:
        """Put this rank's part of `value` into the fp32 weights, or into the optimiser's state of that name."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.to(self.device)
        if self.stage == 3:  # cut here: DeepSpeed's own way forgets that the last rank's part is padded
            size = parameter.partition_numel()  # type: ignore[attr-defined]
            world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
            value = functional.pad(value.flatten(), (0, size * world - value.numel()))[size * rank : size * (rank + 1)]
            if key:
                safe_set_local_optimizer_state(parameter, value, key)
            else:
                safe_set_local_fp32_param(parameter, value)
        elif key:
            safe_set_full_optimizer_state(parameter, value, key)
        else:
            safe_set_full_fp32_param(parameter, value)


def _whole(tensor: torch.Tensor, *, writes: bool = False) -> AbstractContextManager[Any]:
    """A parameter of stage 3 in one piece inside; what rank 0 writes into it holds for all. Others are whole."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if writes else None)


def _library(ranks: Ranks) -> Any:
    """DeepSpeed, quiet, on the process group that is there; raises UserError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"train.strategy=deepspeed needs DeepSpeed ({error}): python -m pip install -c constraints.txt deepspeed, "
            "or take ddp."
        ) from None
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..* is deprecated", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles for half a minute
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    if ranks.device.type == "cuda":  # it takes this for the GPU's number, which is 0 where each process sees one
        os.environ["LOCAL_RANK"] = str(ranks.device.index or 0)
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    if not torch.distributed.is_initialized():  # one process: DeepSpeed wants a group all the same
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, dist_init_required=False, verbose=False)
    return deepspeed
