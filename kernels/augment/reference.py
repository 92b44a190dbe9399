"""Crop, flip, warp and intensity in plain torch, one sample after the other.

Legend of shapes: B samples, C channels, D H W the crop; d h w the box.
"""

import torch
from torch.nn import functional


def augment(image: torch.Tensor, label: torch.Tensor, table: torch.Tensor, parameters: torch.Tensor, channels: int,
            crop: tuple[int, ...], kind: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See `medkernels.augment`; each row of `table` is [first voxel, size, start, stop], of `parameters` [matrix,
    flip, scale, shift]. `kind` is what it calculates in."""
    samples = [
        _sample(image, label, place, row, channels, crop)
        for place, row in zip(table.tolist(), parameters.to(image.device, kind), strict=True)
    ]
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(labels)


def _sample(image: torch.Tensor, label: torch.Tensor, place: list[int], row: torch.Tensor, channels: int,
            crop: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    first, size, start, stop = place[0], place[1:4], place[4:7], place[7:10]
    voxels = size[0] * size[1] * size[2]
    d, h, w = (slice(a, b) for a, b in zip(start, stop, strict=True))
    image_CDHW = image[first * channels :][: voxels * channels].reshape(channels, *size)[:, d, h, w].to(row.dtype)
    label_DHW = label[first:][:voxels].reshape(*size)[d, h, w].to(row.dtype)
    matrix, flip, scale, shift = row.split([12, 3, channels, channels])
    axes = [torch.arange(n, device=row.device, dtype=row.dtype) + 0.5 for n in crop]
    axes = [torch.where(turned > 0, n - axis, axis) for axis, n, turned in zip(axes, crop, flip, strict=True)]
    places = (
        torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) @ matrix.view(3, 4)[:, :3].T + matrix.view(3, 4)[:, 3]
    )
    # grid_sample counts from -1 to 1 between outer edges, in W, H, D order
    sides = torch.tensor(image_CDHW.shape[1:], dtype=row.dtype, device=row.device)
    grid = (2 * places / sides - 1).flip(-1)[None]
    sampled = functional.grid_sample(image_CDHW[None], grid, "bilinear", "zeros", align_corners=False)[0]
    nearest = functional.grid_sample(label_DHW[None, None], grid, "nearest", "zeros", align_corners=False)[0, 0]
    each = (slice(None), None, None, None)
    return (sampled * scale[each] + shift[each]).float(), nearest.to(torch.uint8)
