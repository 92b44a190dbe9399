"""Bytes that a training step moves outside of its convolutions, by count: `python tests/bench/step_bytes.py`.

A prediction, no measurement: elements come from the recipe's own network (on torch's meta device), bytes for each
element from what each implementation has to read and write at least when nothing stays in a cache.
"""

from typing import Any

import torch

from medkernels.group_norm_relu import GroupNormReLU, InstanceNormLeakyReLU
from medseg.models import build_model
from medseg.recipes import RECIPES

COPY_TB_S = 3.0  # what a large copy reads and writes on an H100
# bytes an element, forward and backward. Eager: under autocast group_norm casts bfloat16 to float32 (6), reads twice
# and writes (12), ReLU rewrites in place (8), the convolution casts back (6); backward the casts (12), ReLU (12), group
# norm (20). Fused: bfloat16 read twice and written; backward x and dy read twice, dx written.
NORM = {"eager": (32.0, 44.0), "fused": (6.0, 10.0)}
# Instance norm keeps bfloat16 under autocast. Eager: read twice and written (6), leaky ReLU in place (4); backward the
# rectifier (6), the norm (10). A residual is read and the sum rewritten (6); fused, it is read (2), and in backward the
# output is read and its gradient written (4).
INSTANCE = {"eager": (10.0, 16.0), "fused": (6.0, 10.0)}
RESIDUAL = {"eager": (6.0, 0.0), "fused": (2.0, 4.0)}
# an output voxel. Eager: doubling reads an eighth and writes, adding reads two and writes; backward reads dy, clears
# and adds into dx. Fused: reads an eighth and the skip, writes; backward reads dy, writes an eighth.
UPSAMPLE = {"eager": (8.25, 2.5), "fused": (4.25, 2.25)}
# a logit. Eager is MONAI's squared DiceLoss on float32 with masks: cast 6, masks 14, sigmoid 8, three norms 24;
# backward 46. Fused reads bfloat16 logits and a third of a code, twice, and writes the gradient.
DICE = {"eager": (52.0, 46.0), "fused": (2.0 + 1 / 3, 4.0 + 1 / 3)}


def elements(crop: int, batch: int) -> dict[str, int]:
    """How many elements of each kind one forward pass has."""
    recipe = RECIPES["brats_segresnet"]().override([f"data.crop={crop},{crop},{crop}", "model.kernels=reference"])
    with torch.device("meta"):
        model: Any = build_model(recipe)
    counts = {"group_norm_relu": 0, "upsample_add": 0, "region_dice": 0}

    def norm(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        counts["group_norm_relu"] += output.numel()

    def block(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        counts["upsample_add"] += inputs[0].numel()

    for module in model.modules():
        if isinstance(module, GroupNormReLU):
            module.register_forward_hook(norm)
    for layer in model.up_layers:
        layer.register_forward_pre_hook(block)
    counts["region_dice"] = model(torch.empty(batch, 4, crop, crop, crop, device="meta")).numel()
    return counts


def table(crop: int = 128, batch: int = 2) -> list[tuple[str, str, float, float]]:
    """Rows of kernel, implementation, GB, and ms at the rate of a copy; the last two are the sums."""
    counts, rows = elements(crop, batch), []
    for kernel, costs in (("group_norm_relu", NORM), ("upsample_add", UPSAMPLE), ("region_dice", DICE)):
        for implementation, (forward, backward) in costs.items():
            gigabytes = counts[kernel] * (forward + backward) / 1e9
            rows.append((kernel, implementation, gigabytes, gigabytes / COPY_TB_S))
    for implementation in ("eager", "fused"):
        total = sum(row[2] for row in rows if row[1] == implementation)
        rows.append(("sum", implementation, total, total / COPY_TB_S))
    return rows


def instance_norms(name: str, crop: int = 128, batch: int = 2) -> dict[str, float]:
    """GB of a step's instance norms with their activations and residuals, by implementation."""
    recipe = RECIPES[name]().override([f"data.crop={crop},{crop},{crop}", "model.kernels=reference"])
    model: Any = build_model(recipe).to("meta")
    counts = {"norm": 0, "residual": 0}

    def norm(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        counts["norm"] += output.numel()
        counts["residual"] += output.numel() if len(inputs) > 1 else 0

    for module in model.modules():
        if isinstance(module, InstanceNormLeakyReLU):
            module.register_forward_hook(norm)
    model(torch.empty(batch, 4, crop, crop, crop, device="meta"))
    return {how: (counts["norm"] * sum(INSTANCE[how]) + counts["residual"] * sum(RESIDUAL[how])) / 1e9
            for how in INSTANCE}  # fmt: skip


def main() -> None:
    """Print the recipe's crop and batch."""
    print("| kernel | implementation | GB a step | ms at 3.0 TB/s |\n|---|---|---:|---:|")
    for kernel, implementation, gigabytes, ms in table():
        print(f"| {kernel} | {implementation} | {gigabytes:.2f} | {ms:.2f} |")

    for name in ("brats_unetr", "brats_dynunet", "brats_swinunetr"):
        for implementation, gigabytes in instance_norms(name).items():
            print(f"| instance norms of {name} | {implementation} | {gigabytes:.2f} | {gigabytes / COPY_TB_S:.2f} |")


if __name__ == "__main__":
    main()
