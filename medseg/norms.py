"""MONAI's blocks with each norm and its activation as one kernel: same modules, same weights, same keys."""

import torch
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetResBlock
from monai.networks.blocks.segresnet_block import ResBlock
from monai.networks.nets import SegResNet
from torch import nn

from medkernels.dispatch import Impl
from medkernels.group_norm_relu import GroupNormReLU, InstanceNormLeakyReLU


class KernelUnetResBlock(UnetResBlock):
    """MONAI's residual block, whose second norm, addition and activation are one operator."""

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        """As MONAI's, which adds in place: the sum keeps the convolutions' dtype under autocast."""
        out = self.conv2(self.norm1(self.conv1(inp)))
        residual = self.norm3(self.conv3(inp)) if self.downsample else inp
        return self.norm2(out, residual.to(out.dtype))


def fuse_norms(net: nn.Module, impl: Impl) -> nn.Module:
    """SegResNet, UNETR, SwinUNETR and DynUNet of MONAI with their norms and activations as operators of `impl`.

    In place; parameters and state_dict stay as they are. Raises TypeError where a block has another norm or activation.
    """
    for block in list(net.modules()):
        if isinstance(block, ResBlock):
            block.norm1, block.norm2 = _group(block.norm1, block.act, impl), _group(block.norm2, block.act, impl)
            block.act = nn.Identity()
        elif isinstance(block, UnetResBlock | UnetBasicBlock):
            _fuse_unet_block(block, impl)
    if isinstance(net, SegResNet) and isinstance(net.conv_final, nn.Sequential):
        net.conv_final[0] = _group(net.conv_final[0], net.conv_final[1], impl)
        net.conv_final[1] = nn.Identity()
    return net


def _fuse_unet_block(block: UnetResBlock | UnetBasicBlock, impl: Impl) -> None:
    act = block.lrelu
    block.norm1, block.norm2 = _instance(block.norm1, act, impl), _instance(block.norm2, act, impl)
    if isinstance(block, UnetResBlock):
        if block.downsample:
            block.norm3 = _instance(block.norm3, None, impl)
        block.__class__ = KernelUnetResBlock
    block.lrelu = nn.Identity()


def _group(norm: nn.Module, act: nn.Module, impl: Impl) -> GroupNormReLU:
    if not isinstance(norm, nn.GroupNorm) or not isinstance(act, nn.ReLU):
        raise TypeError(f"no kernel for {type(norm).__name__} with {type(act).__name__}")
    return GroupNormReLU.take_over(norm, impl=impl)


def _instance(norm: nn.Module, act: nn.Module | None, impl: Impl) -> InstanceNormLeakyReLU:
    if not isinstance(norm, nn.InstanceNorm3d) or norm.track_running_stats or not isinstance(act, nn.LeakyReLU | None):
        raise TypeError(f"no kernel for {type(norm).__name__} with {type(act).__name__}")
    return InstanceNormLeakyReLU.take_over(norm, slope=1.0 if act is None else act.negative_slope, impl=impl)
