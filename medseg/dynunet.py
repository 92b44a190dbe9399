"""MONAI's DynUNet, without the graph of its last pass."""

import torch
from monai.networks.nets import DynUNet


class FreeDynUNet(DynUNet):
    """Keeps the outputs of its supervision heads between passes, as MONAI's does, but not what they were made from:
    that would keep the pass's graph, and the steps from being replayed as CUDA graphs.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As MONAI's: (B, regions, ...) logits, or (B, heads + 1, regions, ...) in training under deep supervision."""
        outputs: torch.Tensor = super().forward(x)
        self.heads[:] = [head.detach() for head in self.heads]
        return outputs
