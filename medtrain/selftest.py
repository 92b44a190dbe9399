"""A look at start whether the device convolves rightly: some builds of torch with cuDNN do not (pytorch #163539)."""

import torch
from torch.nn import functional

from medtrain.errors import UserError
from medtrain.precision import autocast, autocasts

# Of the largest value; rounding to bf16 gives 0.4 %, wrong sums are off by tens of per cent.
TOLERANCE = 0.02


def check_convolutions(precision: str, device: torch.device) -> None:
    """Compare a small convolution in 2D and 3D, with its gradient, with the same in fp32; raises UserError where they
    differ.
    """
    if not autocasts(precision):
        return
    generator = torch.Generator().manual_seed(0)
    for kind, convolve in ((2, functional.conv2d), (3, functional.conv3d)):
        image = torch.randn(1, 32, *[16] * kind, generator=generator)
        weight = torch.randn(32, 32, *[3] * kind, generator=generator) / 32
        wanted = _both(convolve, image.to(device), weight.to(device))
        with autocast(precision, device.type):
            found = _both(convolve, image.to(device), weight.to(device))
        for a, b in zip(wanted, found, strict=True):
            error = float((a - b.float()).abs().max() / a.abs().max())
            if not error < TOLERANCE:
                raise UserError(
                    f"torch {torch.__version__} with cuDNN {torch.backends.cudnn.version()} convolves wrongly in "
                    f"{precision} on this {device.type} (off by {error:.0%}): take another build, or "
                    "--set train.precision=fp32."
                )


def _both(convolve: object, image: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The convolution and its gradient by the weights."""
    weight = weight.clone().requires_grad_()
    out = convolve(image, weight, padding=1)  # type: ignore[operator]
    out.float().square().sum().backward()
    assert weight.grad is not None
    return out.detach(), weight.grad
