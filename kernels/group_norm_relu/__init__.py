"""Group normalisation and rectifier in one operator; instance normalisation from the same code.

Legend of shapes: N samples, C channels, G groups of C/G channels, * any spatial dimensions.
"""

import torch
from torch import nn

from medkernels.dispatch import Impl, dtype_refusal, use_fused
from medkernels.group_norm_relu import reference


def group_norm_relu(
    x: torch.Tensor, groups: int, weight_C: torch.Tensor | None = None, bias_C: torch.Tensor | None = None,
    *, residual: torch.Tensor | None = None, eps: float = 1e-5, slope: float = 0.0, impl: Impl = "auto",
) -> torch.Tensor:  # fmt: skip
    """y = act((x - mean) / sqrt(var + eps) * weight + bias + residual), act(v) = v for v > 0, slope * v else.

    Mean and biased variance are over the C/G channels and all voxels of a sample's group (Wu and He, "Group
    Normalization", 2018), in float32 whatever the dtype. `x` (N,C,*) and `residual` of the same shape: float32,
    bfloat16 or float16, dense with channels first or last (others are copied); y has x's dtype and strides. Weight and
    bias (C,) come together or not at all. Gradients: x, weight, bias, residual; the reduction order is fixed, so two
    runs agree bit by bit. Under autocast x keeps its dtype in the fused kernel, while the reference follows torch,
    whose group_norm returns float32 there. Raises ValueError for shapes that do not fit, FusedUnavailable with
    `impl="fused"` on an unable device or dtype.
    """
    _check(x, groups, weight_C, bias_C, residual, slope)
    refusal = dtype_refusal(x, weight_C, bias_C)
    if use_fused("group_norm_relu", impl, (x, weight_C, bias_C, residual), refusal):
        from medkernels.group_norm_relu import fused

        return fused.group_norm_relu(x, groups, weight_C, bias_C, residual, eps, slope)
    return reference.group_norm_relu(x, groups, weight_C, bias_C, residual, eps, slope)


def instance_norm_leaky_relu(
    x: torch.Tensor, weight_C: torch.Tensor | None = None, bias_C: torch.Tensor | None = None,
    *, residual: torch.Tensor | None = None, eps: float = 1e-5, slope: float = 0.01, impl: Impl = "auto",
) -> torch.Tensor:  # fmt: skip
    """As `group_norm_relu` with one group a channel (Ulyanov et al., "Instance Normalization", 2016).

    With `residual` it is the end of a residual block of nnU-Net's kind: act(norm(x) + residual). `slope=1` leaves the
    activation out. The reference raises ValueError for a single voxel, as torch's instance_norm does.
    """
    _check(x, x.shape[1], weight_C, bias_C, residual, slope)
    refusal = dtype_refusal(x, weight_C, bias_C)
    if use_fused("instance_norm_leaky_relu", impl, (x, weight_C, bias_C, residual), refusal):
        from medkernels.group_norm_relu import fused

        return fused.group_norm_relu(x, x.shape[1], weight_C, bias_C, residual, eps, slope)
    return reference.instance_norm_leaky_relu(x, weight_C, bias_C, residual, eps, slope)


class GroupNormReLU(nn.GroupNorm):
    """`nn.GroupNorm` followed by a rectifier: same parameters, same state_dict. Input (N,C,*), output the same."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True, *,
                 slope: float = 0.0, impl: Impl = "auto"):  # fmt: skip
        super().__init__(num_groups, num_channels, eps, affine)
        self.slope, self.impl = slope, impl

    @classmethod
    def take_over(cls, norm: nn.GroupNorm, *, slope: float = 0.0, impl: Impl = "auto") -> "GroupNormReLU":
        """Made around the very parameters of a norm, so an optimiser that holds them keeps working."""
        made = cls(norm.num_groups, norm.num_channels, norm.eps, norm.affine, slope=slope, impl=impl)
        made.weight, made.bias = norm.weight, norm.bias
        return made.train(norm.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise and rectify."""
        return group_norm_relu(
            x, self.num_groups, self.weight, self.bias, eps=self.eps, slope=self.slope, impl=self.impl
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{super().extra_repr()}, slope={self.slope}, impl={self.impl}"


class InstanceNormLeakyReLU(nn.InstanceNorm3d):
    """`nn.InstanceNorm3d`, optional residual, leaky ReLU: same parameters, same state_dict. Input (N,C,D,H,W)."""

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = False, *,
                 slope: float = 0.01, impl: Impl = "auto"):  # fmt: skip
        super().__init__(num_features, eps, affine=affine)
        self.slope, self.impl = slope, impl

    @classmethod
    def take_over(cls, norm: nn.InstanceNorm3d, *, slope: float = 0.01, impl: Impl = "auto") -> "InstanceNormLeakyReLU":
        """Made around the very parameters of a norm, so an optimiser that holds them keeps working."""
        made = cls(norm.num_features, norm.eps, norm.affine, slope=slope, impl=impl)
        made.weight, made.bias = norm.weight, norm.bias
        return made.train(norm.training)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise, add, rectify."""
        return instance_norm_leaky_relu(
            x, self.weight, self.bias, residual=residual, eps=self.eps, slope=self.slope, impl=self.impl
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{super().extra_repr()}, slope={self.slope}, impl={self.impl}"


def _check(x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None,
           residual: torch.Tensor | None, slope: float) -> None:  # fmt: skip
    if x.dim() < 3 or x.numel() == 0 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"x {tuple(x.shape)} needs to be (N,C,*), not empty, with C a multiple of {groups} groups")
    if (weight is None) != (bias is None) or any(p is not None and p.shape != (x.shape[1],) for p in (weight, bias)):
        raise ValueError(f"weight and bias need to be ({x.shape[1]},), or both None")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual needs to be {tuple(x.shape)} {x.dtype}")
    if slope < 0:
        raise ValueError("slope must not be negative: the gradient's mask is read off the output's sign")
