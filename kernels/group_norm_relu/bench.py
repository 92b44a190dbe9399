"""Group norm and ReLU at SegResNet's shapes, instance norm and leaky ReLU at a U-Net's.

`python kernels/group_norm_relu/bench.py` on a GPU. Where a group is small enough for one launch, the chunked kernels
are measured beside it.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial

import torch

from medkernels.dispatch import Impl
from medkernels.group_norm_relu import group_norm_relu, instance_norm_leaky_relu, whole
from medkernels.layout import strides_nsc
from medkernels.measurement import LAYOUTS, Case, Work, asked, compare, compiled, training_step

SHAPES = {
    "group_norm_relu": [(2, 16, 128, 128, 128), (2, 32, 64, 64, 64), (2, 64, 32, 32, 32), (2, 128, 16, 16, 16)],
    "instance_norm_leaky_relu": [(2, 32, 128, 128, 128), (2, 128, 32, 32, 32), (2, 320, 8, 8, 8)],
}
TINY = [(1, 16, 2, 3, 2)]
GROUPS = 8


@contextmanager
def chunks_only():
    """Even small groups are shared by several programs, in three launches."""
    most, whole.MOST = whole.MOST, 0
    try:
        yield
    finally:
        whole.MOST = most


def forward(kernel: str, impl: Impl, device: str, x: torch.Tensor, weight: torch.Tensor,
            bias: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """The reference as in mixed precision: autocast may normalise in float32, the next convolution casts back."""
    with torch.autocast(device, torch.bfloat16, enabled=impl == "reference"):
        if kernel == "group_norm_relu":
            return group_norm_relu(x, GROUPS, weight, bias, impl=impl).to(x.dtype)
        return instance_norm_leaky_relu(x, weight, bias, impl=impl).to(x.dtype)


def chunked(work: Work) -> Work:
    """The same call by the chunked kernels."""

    def inside() -> object:
        with chunks_only():
            return work()

    return inside


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure forward alone, and forward with all gradients."""
    options = asked(__doc__ or "", arguments)
    for kernel, shapes in SHAPES.items():
        reference = partial(forward, kernel, "reference", options.device)
        rivals = {
            "eager": reference, "torch.compile": compiled(reference, options.smoke),
            "fused": partial(forward, kernel, "fused", options.device),
        }  # fmt: skip
        for shape in TINY if options.smoke else shapes:
            for layout, form in LAYOUTS.items():
                if layout == "channels first" and shape != shapes[0] and not options.smoke:
                    continue  # networks with kernels have channels last on a GPU
                x = torch.randn(shape, dtype=torch.bfloat16, device=options.device).contiguous(memory_format=form)
                weight, bias = (torch.ones(shape[1], device=options.device, requires_grad=True) for _ in range(2))
                dy, inputs = torch.randn_like(x), (x.requires_grad_(), weight, bias)
                groups = GROUPS if kernel == "group_norm_relu" else shape[1]
                # forward reads x twice and writes y; backward reads x and dy twice and writes dx
                for what, passes in (("forward", 3), ("forward+backward", 8)):
                    case = Case(kernel, what, shape, "bfloat16", layout, passes * 2 * x.numel())
                    works = {
                        name: partial(f, *inputs) if what == "forward" else training_step(f, inputs, dy)
                        for name, f in rivals.items()
                    }
                    if whole.fits(x, groups, strides_nsc(x)[2]):
                        works["fused, chunks"] = chunked(works["fused"])
                    compare(case, works, options)


if __name__ == "__main__":
    main()
