"""Convolutions of SegResNet's and a U-Net's first levels beside cuDNN's: `python kernels/conv3d/bench.py` on a GPU."""

from collections.abc import Sequence

import torch

from medkernels.conv3d import conv3d
from medkernels.measurement import LAYOUTS, Case, asked, compare, compiled, training_step

# channels in, channels out, side of the kernel, side of the crop
SHAPES = [(4, 16, 3, 128), (16, 16, 3, 128), (32, 32, 3, 128), (32, 32, 3, 64), (32, 16, 3, 128), (16, 3, 1, 128)]
TINY = [(4, 16, 3, 4), (16, 3, 1, 4)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure forward alone, and with all gradients (none of a scan). torch.compile would call cuDNN, too."""
    options = asked(__doc__ or "", arguments)

    def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return conv3d(x, weight, impl="reference")

    def fused(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return conv3d(x, weight, impl="fused")

    torch.backends.cudnn.benchmark = True
    # triton's interpreter knows no products of bfloat16
    kind = torch.float16 if options.smoke else torch.bfloat16
    for channels, channels_out, side, edge in TINY if options.smoke else SHAPES:
        shape = (2, channels, edge, edge, edge)
        x = torch.randn(shape, dtype=kind, device=options.device)
        scale = (channels * side**3) ** -0.5
        weight = torch.randn(channels_out, channels, side, side, side, device=options.device) * scale
        weight.requires_grad_()
        y = torch.randn(2, channels_out, edge, edge, edge, dtype=kind, device=options.device)
        first, last = (
            ((x.contiguous(memory_format=form).requires_grad_(channels > 4), weight), y.contiguous(memory_format=form))
            for form in LAYOUTS.values()
        )
        rivals = {
            "eager, channels first": (reference, *first), "eager": (reference, *last),
            "torch.compile": (compiled(reference, options.smoke), *last), "fused": (fused, *last),
        }  # fmt: skip
        once = 2 * (x.numel() + y.numel())
        for what, moved in (("forward", once), ("forward+backward", once * (3 if channels > 4 else 2))):
            case = Case(
                "conv3d", what, (*shape, channels_out, side), str(kind).removeprefix("torch."), "channels last", moved
            )
            compare(case, {
                name: (lambda f=f, g=given: f(*g)) if what == "forward" else training_step(f, given, dy)
                for name, (f, given, dy) in rivals.items()
            }, options)  # fmt: skip


if __name__ == "__main__":
    main()
