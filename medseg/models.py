"""The networks: MONAI's own classes, built from a recipe, so a checkpoint loads into the plain class."""

from torch import nn

from medseg.recipes import SegRecipe, window_of
from medtrain.errors import UserError

CHANNELS, REGIONS = 4, 3


def build_model(recipe: SegRecipe) -> nn.Module:
    """SegResNet (Myronenko 2018) or UNETR (Hatamizadeh 2022), image (B,4,D,H,W) -> region logits (B,3,D,H,W)."""
    from monai.networks.nets import UNETR, SegResNet

    model, crop = recipe.model, recipe.data.crop
    window = window_of(recipe)
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
    return SegResNet(
        init_filters=model.filters, in_channels=CHANNELS, out_channels=REGIONS, blocks_down=model.blocks_down,
        blocks_up=model.blocks_up, dropout_prob=model.dropout or None,
    )  # fmt: skip
