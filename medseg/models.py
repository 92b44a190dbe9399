"""The networks: MONAI's own classes, built from a recipe, so a checkpoint loads into the plain class."""

import torch
from torch import nn

from medkernels.conv3d import KernelConv3d
from medkernels.dispatch import device_refusal
from medseg.cases import CHANNELS
from medseg.labels import REGIONS
from medseg.recipes import SegRecipe
from medseg.settings import check_network
from medtrain.errors import UserError
from medtrain.strategy import recompute

INPUTS, OUTPUTS = len(CHANNELS), len(REGIONS)


def build_model(recipe: SegRecipe) -> nn.Module:
    """The recipe's network, image (B,4,D,H,W) -> region logits (B,3,D,H,W); with deep supervision, in training,
    (B,1+levels,3,D,H,W), the finest first. Raises UserError where the fields do not fit each other.
    """
    from medseg.norms import fuse_norms

    check_network(recipe)
    impl = recipe.model.kernels
    if impl == "fused" and (reason := device_refusal("cuda" if torch.cuda.is_available() else "cpu")):
        raise UserError(f"model.kernels=fused can not run here ({reason}): --set model.kernels=auto.")
    makers = {"segresnet": _segresnet, "unetr": _unetr, "swinunetr": _swinunetr, "dynunet": _dynunet}
    net, blocks = makers[recipe.model.name](recipe)
    fuse_norms(net, impl)
    if impl != "reference":
        for convolution in filter(KernelConv3d.fits, net.modules()):
            KernelConv3d.take_over(convolution, impl)
    if recipe.train.recompute:
        recompute(module for module in net.modules() if isinstance(module, blocks))
    return net


def try_kernels(recipe: SegRecipe) -> None:
    """On a GPU, leave out the kernels that answer wrongly there (see `medkernels.trial`)."""
    if recipe.model.kernels != "reference" and torch.cuda.is_available():
        from medkernels import trial

        trial.try_kernels(torch.device("cuda", torch.cuda.current_device()))


Built = tuple[nn.Module, tuple[type[nn.Module], ...]]  # a network, and the blocks whose activations may be recomputed


def _unetr(recipe: SegRecipe) -> Built:
    """UNETR (Hatamizadeh 2022)."""
    from monai.networks.blocks.transformerblock import TransformerBlock
    from monai.networks.nets import UNETR

    model = recipe.model
    net = UNETR(
        INPUTS, OUTPUTS, img_size=recipe.data.crop, feature_size=model.feature, hidden_size=model.hidden,
        mlp_dim=model.mlp, num_heads=model.heads, norm_name="instance", res_block=True,
        dropout_rate=model.dropout,
    )  # fmt: skip
    for block in net.vit.blocks:
        # MONAI makes it whether it is used or not, and DDP would wait for its gradient
        block.norm_cross_attn.requires_grad_(False)
    return net, (TransformerBlock,)


def _segresnet(recipe: SegRecipe) -> Built:
    """SegResNet (Myronenko 2018), with its decoder as kernels where they run."""
    from monai.networks.blocks.segresnet_block import ResBlock

    from medseg.segresnet import KernelSegResNet

    model = recipe.model
    net = KernelSegResNet(
        init_filters=model.filters, in_channels=INPUTS, out_channels=OUTPUTS, blocks_down=model.blocks_down,
        blocks_up=model.blocks_up, dropout_prob=model.dropout or None,
    )  # fmt: skip
    net.kernels = model.kernels
    return net, (ResBlock,)


def _swinunetr(recipe: SegRecipe) -> Built:
    """SwinUNETR (Hatamizadeh 2022)."""
    from monai.networks.nets import SwinUNETR
    from monai.networks.nets.swin_unetr import SwinTransformerBlock

    net = SwinUNETR(INPUTS, OUTPUTS, feature_size=recipe.model.feature, drop_rate=recipe.model.dropout)
    return net, (SwinTransformerBlock,)


def _dynunet(recipe: SegRecipe) -> Built:
    """The plain U-Net of nnU-Net (Isensee 2021) as MONAI's DynUNet."""
    from monai.networks.blocks.dynunet_block import UnetBasicBlock

    from medseg.dynunet import FreeDynUNet

    model = recipe.model
    strides = [1] + [2] * (model.levels - 1)
    net = FreeDynUNet(
        3, INPUTS, OUTPUTS, kernel_size=[3] * model.levels, strides=strides, upsample_kernel_size=strides[1:],
        filters=[min(320, model.filters * 2**n) for n in range(model.levels)], dropout=model.dropout or None,
        deep_supervision=model.supervised > 0, deep_supr_num=max(1, model.supervised),
    )  # fmt: skip
    return net, (UnetBasicBlock,)
