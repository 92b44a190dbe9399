"""SegResNet's training step, MONAI against torch.compile against the kernels: time, peak memory, and 200 losses.

`python tests/bench/gpu_step.py` on a GPU appends to kernels/benchmarks.csv and, what the losses say, to results.csv;
`TRITON_INTERPRET=1 python tests/bench/gpu_step.py --smoke` only proves that it runs.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rivals import fresh_peak
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from medkernels.measurement import LAYOUTS, append, asked, milliseconds
from medseg.labels import KNOWN
from medseg.losses import region_loss
from medseg.models import build_model
from medseg.recipes import RECIPES
from medtrain.graphs import Replay
from medtrain.replayed import Gradients


@dataclass(frozen=True)
class Rival:
    """A way to take the step."""

    kernels: str
    layout: str
    how: str = ""


RIVALS = {
    "MONAI eager": Rival("reference", "channels first"),
    "MONAI eager, channels last": Rival("reference", "channels last"),
    "MONAI torch.compile": Rival("reference", "channels last", "default"),
    "MONAI torch.compile, CUDA graphs": Rival("reference", "channels last", "reduce-overhead"),
    "fused": Rival("fused", "channels last"),
    "fused, torch.compile": Rival("fused", "channels last", "default"),
    "fused, replayed": Rival("fused", "channels last", "replay"),
    # what a rank of several does, but for the way of the gradients to the others
    "fused, DDP of one rank": Rival("fused", "channels last", "ddp"),
    "fused, replayed, averaged, one rank": Rival("fused", "channels last", "replayed ranks"),
}
CURVES = ("MONAI eager", "fused, replayed")


def batch_of(options: argparse.Namespace, side: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scans with blobs that a network can learn: image (B,4,D,H,W) float32, codes (B,D,H,W) uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((options.batch, 1, 4, 4, 4), generator=generator)
    height = functional.interpolate(coarse, (side,) * 3, mode="trilinear")[:, 0]
    label = (height > 0.4).to(torch.uint8) + (height > 0.7).to(torch.uint8) + (height > 1.0).to(torch.uint8)
    noise = torch.randn((options.batch, 4, side, side, side), generator=generator)
    image = noise + label[:, None] * torch.tensor([1.0, 0.5, -0.5, -1.0])[:, None, None, None]
    return image.to(options.device), label.to(options.device)


def step_of(rival: Rival, options: argparse.Namespace, side: int, dropout: float) -> Callable[..., torch.Tensor]:
    """A function of image and codes that takes one optimiser step and returns the loss."""
    torch.manual_seed(0)
    recipe = RECIPES["brats_segresnet"]().override(
        [f"data.crop={side},{side},{side}", f"model.kernels={rival.kernels}", f"model.dropout={dropout}",
         *(["model.filters=8", "model.blocks_down=1,1", "model.blocks_up=1"] if options.smoke else [])]
    )  # fmt: skip
    form = LAYOUTS[rival.layout]
    model = build_model(recipe).to(options.device, memory_format=form).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=options.device == "cuda")
    network: Callable[..., torch.Tensor] = model
    if rival.how in ("ddp", "replayed ranks") and not dist.is_initialized():
        dist.init_process_group("gloo" if options.smoke else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    gradients = Gradients(model.parameters()) if rival.how == "replayed ranks" else None
    if rival.how in ("replay", "replayed ranks"):
        if not options.smoke:
            Replay(model)
    elif rival.how == "ddp":
        network = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    elif rival.how:
        how = {"backend": "eager"} if options.smoke else {"mode": rival.how}
        network = torch.compile(model, **how)  # type: ignore[call-overload]

    def step(image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        if rival.how == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(options.device, torch.bfloat16):
            logits = network(image.contiguous(memory_format=form))
        # MONAI's loss is meant for float32; the kernel reads what the network gives
        logits = logits if rival.kernels == "fused" else logits.float()
        loss = region_loss(logits, label, KNOWN["msd"], "dice_bce", recipe.model.kernels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if gradients:
            gradients.take()
            gradients.give(2)  # asks the others, though there are none
        optimizer.step()
        return loss.detach()

    return step


def measure(options: argparse.Namespace) -> None:
    """Time and peak memory of one step of each rival at the recipe's crop and batch."""
    image, label = batch_of(options, options.crop, 0)
    for name in options.names or RIVALS:
        rival = RIVALS[name]
        torch.compiler.reset()
        step: Any = None  # the rival before is gone, or its memory would be missing from this one's
        fresh_peak()
        before = torch.cuda.memory_allocated()
        try:
            step = step_of(rival, options, options.crop, 0.2)
            step(image, label)
            fresh_peak()  # without what cuDNN tried and compilers measured
            for _ in range(0 if options.smoke or options.warm else 5):
                step(image, label)
        except Exception as error:  # compilers fail in many ways, and the other rivals are to be measured all the same
            if options.smoke:
                raise
            print(f"segresnet_step, {name}: FAILS: {type(error).__name__}: {error}", flush=True)
            continue
        if options.smoke or options.warm:
            print(f"segresnet_step, {name}: runs")
            continue
        # weights and optimiser included: the memory of CUDA graphs is theirs from their capture on
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
        ms = milliseconds(lambda s=step: s(image, label), least=20)
        print(f"segresnet_step {tuple(image.shape)}, {name}: {ms:.1f} ms, peak {peak:.0f} MB", flush=True)
        if options.record:
            shape = "x".join(map(str, image.shape))
            append(("segresnet_step", "step", shape, "bfloat16", rival.layout, name, f"{ms:.2f}", "", "", "",
                    f"{peak:.0f}"))  # fmt: skip


def compare_losses(options: argparse.Namespace) -> None:
    """The losses of the same weights on the same batches: largest distance of means over 20 steps."""
    from record import record

    batches = [batch_of(options, options.curve_crop, seed) for seed in range(4)]
    curves = []
    for name in CURVES:
        step = step_of(RIVALS[name], options, options.curve_crop, 0.0)
        losses = torch.stack([step(*batches[n % 4]) for n in range(options.steps)]).cpu()
        curves.append(losses.unfold(0, min(20, options.steps), 1).mean(1))
    gap = (curves[0] - curves[1]).abs().max().item()
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    record("gpu_step", f"largest distance of 20-step mean losses in {options.steps} steps", gap, "loss",
           conditions=f"{device}, crop {options.curve_crop}^3, batch {options.batch}, bf16, {CURVES[0]} against "
           f"{CURVES[1]}, last means {curves[0][-1]:.4f} and {curves[1][-1]:.4f}",
           packages=("torch", "monai", "triton"), keep=options.record)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then compare losses."""
    options = asked(__doc__ or "", arguments, names=tuple(RIVALS))
    sizes = (1, 2, 2, 1) if options.smoke else (2, 128, 64, 200)
    options.batch, options.crop, options.curve_crop, options.steps = sizes
    torch.backends.cudnn.benchmark = True  # as MONAI's tutorial and our engine have it
    measure(options)
    if not (options.warm or options.names):
        compare_losses(options)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
