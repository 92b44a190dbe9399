"""Group norm and ReLU at SegResNet's shapes: `python kernels/group_norm_relu/bench.py` on a GPU."""

from collections.abc import Sequence

import torch

from medkernels.group_norm_relu import group_norm_relu
from medkernels.measurement import LAYOUTS, Case, asked, compare, compiled, training_step

SHAPES = [(2, 16, 128, 128, 128), (2, 32, 64, 64, 64), (2, 64, 32, 32, 32), (2, 128, 16, 16, 16)]
TINY = [(1, 16, 2, 3, 2)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure forward alone, and forward with all gradients."""
    options = asked(__doc__ or "", arguments)

    def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        # as in a mixed-precision step: autocast normalises in float32, the next convolution casts back
        with torch.autocast(options.device, torch.bfloat16):
            return group_norm_relu(x, 8, weight, bias, impl="reference").to(x.dtype)

    def fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return group_norm_relu(x, 8, weight, bias, impl="fused")

    rivals = {"eager": reference, "torch.compile": compiled(reference, options.smoke), "fused": fused}
    for shape in TINY if options.smoke else SHAPES:
        for layout, form in LAYOUTS.items():
            x = torch.randn(shape, dtype=torch.bfloat16, device=options.device).contiguous(memory_format=form)
            x.requires_grad_()
            weight, bias = (torch.ones(shape[1], device=options.device, requires_grad=True) for _ in range(2))
            dy = torch.randn_like(x)
            # forward reads x twice and writes y; backward reads x and dy twice and writes dx
            for what, passes in (("forward", 3), ("forward+backward", 8)):
                case = Case("group_norm_relu", what, shape, "bfloat16", layout, passes * 2 * x.numel())
                inputs = (x, weight, bias)
                compare(case, {
                    name: (lambda f=f, i=inputs: f(*i)) if what == "forward" else training_step(f, inputs, dy)
                    for name, f in rivals.items()
                }, options)  # fmt: skip


if __name__ == "__main__":
    main()
