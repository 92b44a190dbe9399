"""Region Dice and cross-entropy at the recipes' crop: `python kernels/region_dice/bench.py` on a GPU."""

from collections.abc import Sequence

import torch

from medkernels.measurement import LAYOUTS, Case, asked, compare, compiled, training_step
from medkernels.region_dice import region_dice

MSD = ((2, 3), (1, 2, 3), (3,))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the loss alone, and with the gradient of the logits."""
    options = asked(__doc__ or "", arguments)
    side = 4 if options.smoke else 128
    label = torch.randint(0, 4, (2, side, side, side), device=options.device).to(torch.uint8)

    def reference(logits: torch.Tensor) -> torch.Tensor:
        return region_dice(logits, label, MSD, bce=True, impl="reference")

    def fused(logits: torch.Tensor) -> torch.Tensor:
        return region_dice(logits, label, MSD, bce=True, impl="fused")

    rivals = {"eager": reference, "torch.compile": compiled(reference, options.smoke), "fused": fused}
    for dtype in (torch.bfloat16, torch.float32):
        for layout, form in LAYOUTS.items():
            shape = (2, 3, side, side, side)
            logits = torch.randn(shape, dtype=dtype, device=options.device).contiguous(memory_format=form)
            logits.requires_grad_()
            # each pass reads logits and codes, the one backward writes as many gradients
            once = logits.numel() * logits.element_size()
            for what, counted in (
                ("forward", once + label.numel()),
                ("forward+backward", 3 * once + 2 * label.numel()),
            ):
                case = Case("region_dice", what, shape, str(dtype).removeprefix("torch."), layout, counted)
                compare(case, {
                    name: (lambda f=f, x=logits: f(x)) if what == "forward" else training_step(f, (logits,))
                    for name, f in rivals.items()
                }, options)  # fmt: skip


if __name__ == "__main__":
    main()
