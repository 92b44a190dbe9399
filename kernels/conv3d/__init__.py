"""Convolution of few channels: 3x3x3 with a padding of one, and 1x1x1, both with a stride of one, channels last.

Legend of shapes: B samples, I channels in, O channels out, D H W voxels.
"""

import torch
from torch import nn

from medkernels.conv3d import reference
from medkernels.dispatch import Impl, use_fused

HALF = (torch.bfloat16, torch.float16)
WIDE = (16, 32)  # channels of a 3x3x3 convolution; 4 in, as scans have, besides
WIDEST_ROW = 128  # voxels along W: a program holds a row
LEAST_VOXELS = 100_000  # of a batch: fewer would hardly fill a device, and were not measured


def conv3d(x_BIDHW: torch.Tensor, weight_OIkkk: torch.Tensor, bias_O: torch.Tensor | None = None,
           *, impl: Impl = "auto") -> torch.Tensor:  # fmt: skip
    """torch's `conv3d` of x (B,I,D,H,W) with weights (O,I,3,3,3), padded by one, or (O,I,1,1,1): y (B,O,D,H,W).

    x bfloat16 or float16 with channels last, as y has them, but for up to four channels of 1x1x1, which come first;
    weights and bias in any dtype, rounded to x's. Sums in float32 and in a fixed order, so gradients agree bit by bit
    from run to run; those of weights and bias are in their own dtype. `auto` takes torch's wherever `refusal` has a
    reason or the batch is small. Raises ValueError for shapes that do not fit, FusedUnavailable with `impl="fused"`
    where the kernel can not run.
    """
    _check(x_BIDHW, weight_OIkkk, bias_O)
    reason = refusal(x_BIDHW, weight_OIkkk, bias_O)
    takes = impl == "fused" or not (reason or small(x_BIDHW))
    if takes and use_fused("conv3d", impl, (x_BIDHW, weight_OIkkk, bias_O), reason):
        from medkernels.conv3d import fused

        return fused.conv3d(x_BIDHW, weight_OIkkk, bias_O)
    cast = [None if t is None else t.to(x_BIDHW.dtype) for t in (weight_OIkkk, bias_O)]
    return reference.conv3d(x_BIDHW, *cast)


def small(x: torch.Tensor) -> bool:
    """Whether a batch is too small for the kernel to be faster."""
    return x.numel() < LEAST_VOXELS * x.shape[1]


def refusal(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
    """Why the kernel does not take a convolution, or an empty text."""
    channels_out, channels = weight.shape[:2]
    if x.dtype not in HALF:
        return f"no kernel for {x.dtype}"
    if not x.is_contiguous(memory_format=torch.channels_last_3d):
        return "channels are not last"
    if weight.shape[2] == 1:
        # the others are products of matrices, which torch does as well
        return "" if min(channels, channels_out) % 8 and max(channels, channels_out) <= 64 else "1x1x1 is not odd"
    if bias is not None:
        return "3x3x3 with a bias"
    if channels_out not in WIDE or channels not in (4, *WIDE):
        return f"{channels} channels to {channels_out}"
    return "" if x.shape[4] <= WIDEST_ROW else f"rows of {x.shape[4]} voxels"


class KernelConv3d(nn.Conv3d):
    """`nn.Conv3d` with the kernel where it runs: same parameters, same state_dict. Input (B,I,D,H,W), output alike."""

    prefers_channels_last = True
    impl: Impl = "auto"

    @classmethod
    def take_over(cls, convolution: nn.Conv3d, impl: Impl) -> "KernelConv3d":
        """The very module, parameters and hooks as they are, with another forward pass."""
        convolution.__class__ = cls
        convolution.impl = impl
        return convolution  # type: ignore[return-value]

    @staticmethod
    def fits(convolution: nn.Module) -> bool:
        """Whether a module is a convolution that the kernel may take, whatever its input will be."""
        if type(convolution) is not nn.Conv3d or convolution.padding_mode != "zeros" or convolution.groups != 1:
            return False
        kind = (convolution.kernel_size, convolution.padding)
        plain = convolution.stride == convolution.dilation == (1, 1, 1)
        return plain and kind in (((3, 3, 3), (1, 1, 1)), ((1, 1, 1), (0, 0, 0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve, in autocast's dtype where that is on."""
        kind = x.device.type
        if self.impl == "reference" or kind != "cuda":
            return super().forward(x)
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if refusal(x, self.weight, self.bias) or small(x):
            return super().forward(x)
        return conv3d(x, self.weight, self.bias, impl=self.impl)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    sides = tuple(weight.shape[2:])
    if x.dim() != 5 or weight.dim() != 5 or x.numel() == 0 or sides not in ((3, 3, 3), (1, 1, 1)):
        raise ValueError(f"x {tuple(x.shape)} needs to be (B,I,D,H,W), weight {tuple(weight.shape)} of side 3 or 1")
    if x.shape[1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"weight {tuple(weight.shape)} and bias do not fit {x.shape[1]} channels")
