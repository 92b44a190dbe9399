"""Trilinear doubling with skip at SegResNet's shapes: `python kernels/upsample_add/bench.py` on a GPU."""

from collections.abc import Sequence

import torch

from medkernels.measurement import LAYOUTS, Case, asked, compare, compiled, training_step
from medkernels.upsample_add import upsample_add

SHAPES = [(2, 16, 64, 64, 64), (2, 32, 32, 32, 32), (2, 64, 16, 16, 16)]
TINY = [(1, 2, 1, 2, 3)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure forward alone, and with both gradients. torch's backward adds atomically."""
    options = asked(__doc__ or "", arguments)

    def reference(x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return upsample_add(x, skip, impl="reference")

    def fused(x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return upsample_add(x, skip, impl="fused")

    rivals = {"eager": reference, "torch.compile": compiled(reference, options.smoke), "fused": fused}
    for shape in TINY if options.smoke else SHAPES:
        for layout, form in LAYOUTS.items():
            if layout == "channels first" and shape != SHAPES[0] and not options.smoke:
                continue  # networks with kernels have channels last on a GPU
            inputs = [
                torch.randn(size, dtype=torch.bfloat16, device=options.device).contiguous(memory_format=form)
                for size in (shape, (*shape[:2], *(2 * side for side in shape[2:])))
            ]
            x, skip = (tensor.requires_grad_() for tensor in inputs)
            dy = torch.randn_like(skip)
            # forward reads x and skip and writes y; backward reads dy and writes dx, the skip's gradient is dy itself
            counted = 2 * (x.numel() + 2 * skip.numel())
            for what, moved in (("forward", counted), ("forward+backward", counted + 2 * (x.numel() + skip.numel()))):
                case = Case("upsample_add", what, shape, "bfloat16", layout, moved)
                compare(case, {
                    name: (lambda f=f, a=x, b=skip: f(a, b)) if what == "forward" else training_step(f, (x, skip), dy)
                    for name, f in rivals.items()
                }, options)  # fmt: skip


if __name__ == "__main__":
    main()
