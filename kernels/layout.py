"""The two memory layouts that kernels take: channels first and channels last, both dense.

Legend of shapes: N samples, C channels, S all voxels of a sample.
"""

import torch


def dense(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it is dense with channels first or last, else a copy with channels first."""
    return x if x.is_contiguous() or x.is_contiguous(memory_format=channels_last(x.dim())) else x.contiguous()


def like(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The tensor with the strides of `other`, which is dense; copied only where they differ."""
    if other.is_contiguous():
        return x.contiguous()
    return x.contiguous(memory_format=channels_last(other.dim()))


def channels_last(dims: int) -> torch.memory_format:
    """The channels-last format of 4 or 5 dimensions; contiguous for other numbers."""
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(dims, torch.contiguous_format)


def strides_nsc(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of sample, voxel (flattened) and channel of a dense tensor (N,C,*)."""
    channels, voxels = x.shape[1], x[0, 0].numel()
    if x.is_contiguous():
        return channels * voxels, 1, voxels
    return channels * voxels, channels, 1
