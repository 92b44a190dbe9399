"""Sliding windows of a BraTS scan added up: `python kernels/window_accumulate/bench.py` on a GPU."""

from collections.abc import Sequence

import torch

from medkernels.measurement import Case, asked, compare, compiled
from medkernels.window_accumulate import window_accumulate


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure batches of two windows, of one member and of two."""
    options = asked(__doc__ or "", arguments)
    size, side = ((6, 7, 5), 4) if options.smoke else ((240, 240, 155), 128)
    step = side // 2
    starts = [(0, 0, 0), (0, 0, min(step, size[2] - side))]
    importance = torch.rand(side, side, side, device=options.device)

    def reference(total: torch.Tensor, weight: torch.Tensor, windows: torch.Tensor) -> None:
        window_accumulate(total, weight, windows, starts, importance, impl="reference")

    def fused(total: torch.Tensor, weight: torch.Tensor, windows: torch.Tensor) -> None:
        window_accumulate(total, weight, windows, starts, importance, impl="fused")

    rivals = {"eager": reference, "torch.compile": compiled(reference, options.smoke), "fused": fused}
    for members in (1, 2):
        total = torch.zeros(members, 3, *size, device=options.device)
        weight = torch.zeros(size, device=options.device)
        shape = (members, len(starts), 3, side, side, side)
        windows = torch.randn(shape, dtype=torch.bfloat16, device=options.device)
        # windows and their share of importance are read once, the box that they cover is read and written once
        box = side * side * (side + starts[1][2])
        counted = 2 * windows.numel() + 4 * importance.numel() + 2 * 4 * box * (3 * members + 1)
        case = Case("window_accumulate", "2 windows", shape, "bfloat16", "channels first", counted)
        given = (total, weight, windows)
        compare(case, {name: (lambda f=f, g=given: f(*g)) for name, f in rivals.items()}, options)


if __name__ == "__main__":
    main()
