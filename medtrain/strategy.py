"""How gradients become steps: alone or over ranks, in mixed precision."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as checkpointed

from medtrain import checkpoint
from medtrain.compilation import COMPILED, compiled
from medtrain.distributed import Ranks, any_rank
from medtrain.errors import UserError, out_of_memory
from medtrain.graphs import Passes, passes_replayed
from medtrain.precision import allow_tf32, autocast, autocasts, precision_for
from medtrain.recipe import Optim, Recipe
from medtrain.wording import shown

Group = dict[str, Any]
Forward = Callable[[torch.Tensor], torch.Tensor]


def inference(model: nn.Module, recipe: Recipe, device: torch.device) -> Forward:
    """A trained network as prediction calls it: on the device, in the precision that the recipe chooses there, float32
    out. A recipe of fp16 or tf32 predicts in fp32 on a CPU.
    """
    gpus_own = recipe.train.precision in ("fp16", "tf32") and device.type == "cpu"
    precision = "fp32" if gpus_own else precision_for(recipe, device)
    allow_tf32(precision)
    choose_convolutions(recipe, device)
    layout = layout_of(model, recipe, device, precision)
    model = laid_out(model.to(device), layout).eval()
    return forwarding(Passes(model) if passes_replayed(recipe, device) else model, precision, device, layout)


def forwarding(network: Forward, precision: str, device: torch.device, layout: torch.memory_format) -> Forward:
    """A network in evaluation mode as a function of images on whatever device: mixed precision, float32 out."""

    def forward(image: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), autocast(precision, device.type):
            return network(image.to(device).contiguous(memory_format=layout)).float()

    return forward


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Let blocks keep no activations for the backward pass, but compute them again there (activation checkpointing)."""
    for block in blocks:
        block.forward = partial(_recomputed, block, block.forward)


def _recomputed(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if block.training and torch.is_grad_enabled():
        return checkpointed(forward, *inputs, use_reentrant=False, **named)
    return forward(*inputs, **named)


def one_group(model: nn.Module) -> list[Group]:
    """Every trainable parameter under the recipe's own learning rate, from the first step on."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr_scale": 1.0, "frozen_epochs": 0}]


def make_optimizer(optim: Optim, groups: Sequence[Group], device: torch.device) -> torch.optim.Optimizer:
    """Adam (L2), AdamW (decoupled) or SGD with Nesterov momentum 0.99; fused where the device has it."""
    if optim.library == "apex":
        from medtrain.apex_optimizers import make_apex

        return make_apex(optim, groups, device)
    fused = device.type in ("cuda", "cpu")
    if optim.name == "sgd":
        sgd = torch.optim.SGD(
            groups, optim.lr, momentum=0.99, nesterov=True, weight_decay=optim.weight_decay, fused=fused
        )
        for group in sgd.param_groups:  # torch leaves them unset where the very first step is skipped
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    return kind(groups, optim.lr, weight_decay=optim.weight_decay, fused=fused)


def layout_of(model: nn.Module, recipe: Recipe, device: torch.device, precision: str) -> torch.memory_format:
    """How inputs lie: channels last, for the model's own number of dimensions, where the recipe wants it; `auto` does
    on a GPU in mixed precision, if a module of the model says that it prefers it.
    """
    wanted = recipe.train.channels_last
    if wanted == "auto" and device.type == "cuda" and autocasts(precision):
        prefers = any(getattr(module, "prefers_channels_last", False) for module in model.modules())
        wanted = "on" if prefers else "off"
    if wanted != "on":
        return torch.contiguous_format
    volumes = any(parameter.ndim == 5 for parameter in model.parameters())
    return torch.channels_last_3d if volumes else torch.channels_last


def laid_out(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """The model with its weights in a layout of inputs; in place."""
    if layout != torch.contiguous_format:
        model.to(memory_format=layout)  # type: ignore[call-overload]
    return model


def choose_convolutions(recipe: Recipe, device: torch.device) -> None:
    """Let cuDNN try its ways at the first batch and keep the fastest, as all batches are alike; not where runs are to
    agree bit by bit.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not recipe.train.deterministic


def lay_states(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimiser's states lie as its parameters do: a run may go on in another layout, where fused optimisers
    would take one number for another.
    """
    for parameter, states in optimizer.state.items():
        for name, value in states.items():
            alike = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if alike and value.stride() != parameter.stride():
                states[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class Statistics:
    """The running statistics of a model as parts of one tensor, so that a skipped step is taken back without a loop."""

    def __init__(self, model: nn.Module):
        found = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point()
        ]
        self.now = torch.cat([buffer.reshape(-1) for *_, buffer in found]) if found else torch.empty(0)
        self.before = self.now.clone()
        parts = self.now.split([buffer.numel() for *_, buffer in found]) if found else []
        for (module, name, buffer), part in zip(found, parts, strict=True):
            setattr(module, name, part.view_as(buffer))

    def roll_back_if(self, skipped: torch.Tensor) -> None:
        """After a step: forget what it brought where `skipped` is 1, else keep it."""
        if self.now.numel():
            self.now.copy_(torch.where(skipped.bool(), self.before, self.now))
            self.before.copy_(self.now)

    def loaded(self) -> None:
        """Keep what was put into the buffers from outside."""
        self.before.copy_(self.now)


class Single:
    """One process: autocast, loss scaling for fp16, clipping, the optimiser's step.

    A parameter group may have `lr_scale`, which multiplies the learning rate, and `frozen_epochs`, before which its
    parameters do not move (see `freeze`).
    """

    shards = False  # whether ranks hold different parts, so that all must take part in `state` and `weights`
    lays_weights = True  # whether weights lie as inputs do

    def __init__(self, model: nn.Module, groups: Sequence[Group], recipe: Recipe, ranks: Ranks):
        self.precision = precision_for(recipe, ranks.device)
        allow_tf32(self.precision)
        self.device = ranks.device
        self.library = recipe.optim.library
        self.clip_norm = recipe.optim.clip_norm
        choose_convolutions(recipe, ranks.device)
        self.layout = layout_of(model, recipe, ranks.device, self.precision)
        wanted = recipe.train.compile
        self.compiling, self._compiled = wanted if wanted in COMPILED else "off", False
        self.model = laid_out(model.to(ranks.device), self.layout if self.lays_weights else torch.contiguous_format)
        self.statistics = Statistics(self.model)
        self.optimizer = make_optimizer(recipe.optim, groups, ranks.device)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.precision == "fp16")
        self.wrapped: nn.Module = self.model
        self.called: Callable[..., Any] = self.wrapped
        if self.compiling != "off":
            self.called = compiled(self.wrapped, self.compiling)

    def train_mode(self) -> None:
        """Training mode, but evaluation mode for layers whose parameters are frozen: their statistics stay."""
        self.wrapped.train()
        for module in self.model.modules():
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()

    def freeze(self, epoch: float) -> bool:
        """Freeze or release the groups as this epoch wants it; tells whether anything changed."""
        changed = False
        for group in self.optimizer.param_groups:
            trains = epoch + 1e-9 >= group["frozen_epochs"]
            if group["params"][0].requires_grad != trains:
                changed = True
                for parameter in group["params"]:
                    parameter.requires_grad_(trains)
        if changed:
            self.train_mode()
        return changed

    def sync_buffers(self) -> None:
        """Make the buffers (such as running statistics) of every rank those of rank 0."""
        broadcast_tensors(self.model.buffers())

    def forward(self, inputs: torch.Tensor) -> Any:
        """The network's outputs in training, computed in mixed precision, in float32."""
        with self.autocast():
            inputs = inputs.contiguous(memory_format=self.layout)
            if self.compiling == "graphs":
                torch.compiler.cudagraph_mark_step_begin()  # the outputs of the step before may be written over
            if self.compiling != "off" and not self._compiled:
                return self._compile(inputs).float()
            return self.called(inputs).float()

    def _compile(self, inputs: torch.Tensor) -> Any:
        """The first call of the compiled network, in which the compiler may fail."""
        outputs, words = None, ""
        try:
            outputs = self.called(inputs)
        except Exception as error:  # compilers fail in many ways
            if out_of_memory(error):
                raise
            words = f"torch.compile fails ({type(error).__name__}: {shown(error, 120)})"
            if self.compiling != "try":
                raise UserError(f"{words}: --set train.compile=try or off.") from error
            print(f"note: {words}; the run goes on without", flush=True)
        # all or none: the first call may have told the other ranks of buffers, and so does a second one
        if self.compiling == "try" and any_rank(bool(words)):
            self.compiling, self.called = "off", self.wrapped
            return self.called(inputs)
        self._compiled = True
        return outputs

    def evaluated(self) -> nn.Module:
        """The whole network, for evaluation (see `forwarding`)."""
        return self.model

    def autocast(self) -> AbstractContextManager[Any]:
        """The mixed-precision context of a forward pass."""
        return autocast(self.precision, self.device.type)

    def accumulating(self) -> AbstractContextManager[Any]:
        """The context of a backward pass whose gradients are not yet complete."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradients."""
        self.scaler.scale(loss).backward()

    def step(self, lr: float) -> torch.Tensor:
        """Clip, update the weights, and clear the gradients. A step whose gradients are not finite changes nothing;
        returns 1 for such a one, else 0, on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        skipped = (~torch.isfinite(norm)).float()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.library == "apex":
            if not bool(skipped):  # it asks the device: apex has no way to skip there without a scaler
                self.optimizer.step()
        else:
            # how a GradScaler tells a fused optimiser to skip, without the host's asking the device
            self.optimizer.grad_scale, self.optimizer.found_inf = None, skipped  # type: ignore[attr-defined]
            self.optimizer.step()
        self.statistics.roll_back_if(skipped)
        self.model.zero_grad()  # apex's optimisers have ways of their own
        return skipped

    def loss_scale(self) -> float | None:
        """What losses are multiplied by against underflow in fp16; None in other precisions. Waits for the device."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else None

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole network's state_dict."""
        return self.model.state_dict()

    def take_weights(self, content: dict[str, Any], path: Path) -> None:
        """Put a checkpoint's weights into the network that is evaluated; raises UserError where they do not fit."""
        checkpoint.load_model(self.model, content, path)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, on the same or another number of ranks."""
        return {
            "model": self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "library": self.library,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take `state`'s values back; raises UserError where another library's optimiser left them, ValueError where
        they do not fit.
        """
        library = state.get("library", "torch")
        if library != self.library:
            raise UserError(f"the run was begun with optim.library={library}: --set optim.library={library}.")
        checkpoint.take_weights(self.model, state["model"])
        self.statistics.loaded()
        self.optimizer.load_state_dict(state["optimizer"])
        lay_states(self.optimizer)
        if state["scaler"] and self.scaler.is_enabled():  # empty where the run went on from bf16 to fp16
            self.scaler.load_state_dict(state["scaler"])


class Ddp(Single):
    """Several processes with equal weights; gradients are averaged while they are computed."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], recipe: Recipe, ranks: Ranks):
        super().__init__(model, groups, recipe, ranks)
        self.deterministic = recipe.train.deterministic
        frozen = any(group["frozen_epochs"] for group in groups)
        # the same parameters get gradients in every step, which DDP then need not find out
        self.static = not (self.deterministic or frozen or recipe.train.accumulate > 1 or self.compiling != "off")
        self._wrap()

    def _wrap(self) -> None:
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Looking for unused parameters keeps DDP from sorting its buckets anew after the first step: then a run that
        # goes on would sum one step over three or more ranks in another order than one that never stopped.
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        self.wrapped = DistributedDataParallel(self.model, device_ids=ids, gradient_as_bucket_view=True,
                                               find_unused_parameters=self.deterministic,
                                               static_graph=self.static)  # fmt: skip
        self.called = self.wrapped
        if self.compiling != "off":  # around the wrapper: graphs end where a bucket of gradients is ready
            self.called = compiled(self.wrapped, self.compiling)

    def freeze(self, epoch: float) -> bool:
        changed = super().freeze(epoch)
        if changed:  # the wrapper waits for the gradients of the parameters that it saw when it was made
            self._wrap()
            self.train_mode()
        return changed

    def accumulating(self) -> AbstractContextManager[Any]:
        return self.wrapped.no_sync()  # type: ignore[operator]


def broadcast_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Give tensors the values that they have on rank 0, if there are others."""
    if not torch.distributed.is_initialized():
        return
    for tensor in tensors:
        whole = tensor.detach().contiguous()
        torch.distributed.broadcast(whole, src=0)
        tensor.detach().copy_(whole)
