"""MONAI's SegResNet with the steps of its decoder as kernels: same modules, same weights, same keys."""

import torch
from monai.networks.nets import SegResNet

from medkernels.dispatch import Impl
from medkernels.upsample_add import upsample_add


class KernelSegResNet(SegResNet):
    """SegResNet whose upsampling and skip are one operator. Built and loaded as MONAI's; `kernels` may be set."""

    kernels: Impl = "auto"
    replays = True  # its steps were compared with MONAI's when replayed as CUDA graphs

    def decode(self, x: torch.Tensor, down_x: list[torch.Tensor]) -> torch.Tensor:
        """As MONAI's, which interpolates and adds in two steps."""
        for (shrink, _), block, skip in zip(self.up_samples, self.up_layers, down_x[1:], strict=True):
            x = block(upsample_add(shrink(x), skip, impl=self.kernels))
        return self.conv_final(x) if self.use_conv_final else x
