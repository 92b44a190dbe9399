"""The networks: MONAI's own classes, built from a recipe, so a checkpoint loads into the plain class."""

import torch
from torch import nn

from medkernels.dispatch import Impl, device_refusal
from medkernels.group_norm_relu import GroupNormReLU
from medseg.recipes import SegRecipe, window_of
from medtrain.errors import UserError

CHANNELS, REGIONS = 4, 3


def build_model(recipe: SegRecipe) -> nn.Module:
    """SegResNet (Myronenko 2018) or UNETR (Hatamizadeh 2022), image (B,4,D,H,W) -> region logits (B,3,D,H,W)."""
    from monai.networks.nets import UNETR

    from medseg.segresnet import KernelSegResNet

    model, crop = recipe.model, recipe.data.crop
    window = window_of(recipe)
    if model.kernels == "fused" and (reason := device_refusal("cuda" if torch.cuda.is_available() else "cpu")):
        raise UserError(f"model.kernels=fused can not run here ({reason}): --set model.kernels=auto.")
    if model.name == "unetr":
        if any(side % 16 for side in crop) or model.hidden % model.heads:
            raise UserError(f"UNETR needs crop sides that are multiples of 16 and hidden % heads = 0, not {crop}.")
        if window != crop:
            raise UserError(f"UNETR needs evaluate.window to be its crop {crop}: --set evaluate.window=0,0,0.")
        net = UNETR(
            CHANNELS, REGIONS, img_size=crop, feature_size=model.feature, hidden_size=model.hidden,
            mlp_dim=model.mlp, num_heads=model.heads, norm_name="instance", res_block=True,
            dropout_rate=model.dropout,
        )  # fmt: skip
        for block in net.vit.blocks:
            # MONAI makes it whether it is used or not, and DDP would wait for its gradient
            block.norm_cross_attn.requires_grad_(False)
        return net
    multiple = 2 ** (len(model.blocks_down) - 1)
    if model.filters % 8 or len(model.blocks_up) != len(model.blocks_down) - 1:
        raise UserError("SegResNet needs model.filters in eights and one model.blocks_up less than model.blocks_down.")
    if any(side % multiple for side in (*crop, *window)):
        raise UserError(
            f"SegResNet needs crop and window sides that are multiples of {multiple}, not {crop} and {window}: "
            "--set data.crop or evaluate.window."
        )
    segresnet = KernelSegResNet(
        init_filters=model.filters, in_channels=CHANNELS, out_channels=REGIONS, blocks_down=model.blocks_down,
        blocks_up=model.blocks_up, dropout_prob=model.dropout or None,
    )  # fmt: skip
    segresnet.kernels = model.kernels
    return fuse_norms(segresnet, model.kernels)


def fuse_norms(net: nn.Module, impl: Impl) -> nn.Module:
    """MONAI's SegResNet with each pair of group norm and ReLU as one operator of `impl`, in place.

    Parameters and state_dict stay as they are. Raises TypeError where a block has another norm or activation.
    """
    from monai.networks.blocks.segresnet_block import ResBlock

    def fused(norm: nn.Module, act: nn.Module) -> GroupNormReLU:
        if not isinstance(norm, nn.GroupNorm) or not isinstance(act, nn.ReLU):
            raise TypeError(f"no kernel for {type(norm).__name__} with {type(act).__name__}")
        return GroupNormReLU.take_over(norm, impl=impl)

    for block in [module for module in net.modules() if isinstance(module, ResBlock)]:
        block.norm1, block.norm2 = fused(block.norm1, block.act), fused(block.norm2, block.act)
        block.act = nn.Identity()
    if isinstance(net.conv_final, nn.Sequential):
        net.conv_final[0] = fused(net.conv_final[0], net.conv_final[1])
        net.conv_final[1] = nn.Identity()
    return net
