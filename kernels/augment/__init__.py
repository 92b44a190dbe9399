"""Crop, flip, affine warp and intensity of samples in one gather from volumes that stay on the GPU.

Legend of shapes: V volumes, B samples, R length of a parameter row, C channels, D H W the crop.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from medkernels.augment import reference
from medkernels.dispatch import Impl, use_fused

APPLIED = ("warp", "matrix", "flip", "scale", "shift")
IDENTITY = {"noise": 0.0, "blur": 0.0, "contrast": 1.0, "low": 1.0, "gamma": 1.0}


@dataclass(frozen=True)
class Volumes:
    """Volumes of any sizes end to end: image (all voxels of all channels) float16 or uint8, label uint8 codes."""

    image: torch.Tensor
    label: torch.Tensor
    sizes: tuple[tuple[int, int, int], ...]
    channels: int

    @classmethod
    def pack(cls, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device | str,
             voxels: int | None = None) -> Self:  # fmt: skip
        """From image (C,D,H,W) and label (D,H,W) of each case; ValueError where they do not fit together.

        With `voxels`, their number in all labels, one pair after the other is read and moved; else all are held first.
        """
        if voxels is None:
            pairs = list(pairs)
            voxels = sum(label.numel() for _, label in pairs)
        image, label, channels, at = torch.empty(0), torch.empty(0), 0, 0
        sizes: list[tuple[int, int, int]] = []
        for image_CDHW, label_DHW in pairs:
            if image_CDHW.shape[1:] != label_DHW.shape or image_CDHW.dtype not in (torch.float16, torch.uint8):
                raise ValueError(f"image {tuple(image_CDHW.shape)} {image_CDHW.dtype}, label {tuple(label_DHW.shape)}")
            if not sizes:
                channels = image_CDHW.shape[0]
                image = torch.empty(channels * voxels, dtype=image_CDHW.dtype, device=device)
                label = torch.empty(voxels, dtype=label_DHW.dtype, device=device)
            end = at + label_DHW.numel()
            if image_CDHW.shape[0] != channels or end > voxels:
                raise ValueError("volumes need to have the same number of channels, and as many voxels as was told")
            image[channels * at : channels * end].copy_(image_CDHW.reshape(-1))
            label[at:end].copy_(label_DHW.reshape(-1))
            sizes.append((label_DHW.shape[0], label_DHW.shape[1], label_DHW.shape[2]))
            at = end
        if at != voxels:
            raise ValueError(f"{at} voxels, not {voxels} as was told")
        return cls(image, label, tuple(sizes), channels)

    def first_voxel(self, volume: int) -> int:
        """Where a volume's label begins; its image begins at so many times the channels."""
        return sum(d * h * w for d, h, w in self.sizes[:volume])


def augment(
    volumes: Volumes, cases: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]],
    rows_BR: torch.Tensor, fields: Mapping[str, slice], crop: Sequence[int], *, impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Image (B,C,D,H,W) float32 and label (B,D,H,W) uint8 of samples, each from the box (start, stop) of its case.

    x[i] = scale * trilinear(box, M (f(i) + 1/2) - 1/2) + shift, f the flips, M the 3x4 matrix in D, H, W order with
    voxel centres at one half, or the identity where `warp` is 0; zero outside of the box, and in a box that reaches
    out of its volume zero there; labels by the nearest voxel.
    `rows_BR` float32 on the CPU and `fields`, where each field lies in a row, are those of the DALI pipeline
    (`medseg.rows`). Raises ValueError for rows that ask for what one gather can not do (noise, blur, contrast, low
    resolution, gamma), or boxes that do not fit; FusedUnavailable with `impl="fused"` on an unable device.
    """
    table, parameters = prepared(volumes, cases, boxes, rows_BR, fields, crop)
    if use_fused("augment", impl, (volumes.image, volumes.label)):
        from medkernels.augment import fused

        return fused.augment(volumes.image, volumes.label, table, parameters, volumes.channels, tuple(crop))
    return reference.augment(volumes.image, volumes.label, table, parameters, volumes.channels, tuple(crop))


def prepared(
    volumes: Volumes, cases: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]],
    rows_BR: torch.Tensor, fields: Mapping[str, slice], crop: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What both implementations take, on the CPU: where each sample lies (B,10) int64, and its matrix, flips, scales
    and shifts (B,15+2C) float32. Raises ValueError as `augment` does.
    """
    _check(volumes, cases, boxes, rows_BR, fields, crop)
    parts = {name: rows_BR[:, fields[name]] for name in APPLIED}
    identity = torch.eye(3, 4).reshape(1, 12)
    boxes, moved = _inside(volumes, cases, boxes)
    matrix = torch.where(parts["warp"] != 0, parts["matrix"], identity)
    matrix[:, 3::4] += moved
    parameters = torch.cat([matrix, parts["flip"], parts["scale"], parts["shift"]], 1)
    table = torch.tensor(
        [[volumes.first_voxel(case), *volumes.sizes[case], *start, *stop]
         for case, (start, stop) in zip(cases, boxes, strict=True)]
    )  # fmt: skip
    return table, parameters


def _inside(
    volumes: Volumes, cases: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[list[tuple[list[int], list[int]]], torch.Tensor]:
    """The part of each box that lies in its volume, and how far (B,3) the places in the box move for it."""
    cut, moved = [], []
    for case, (start, stop) in zip(cases, boxes, strict=True):
        low = [max(a, 0) for a in start]
        cut.append((low, [min(b, n) for b, n in zip(stop, volumes.sizes[case], strict=True)]))
        moved.append([float(a - b) for a, b in zip(start, low, strict=True)])
    return cut, torch.tensor(moved)


def _check(volumes: Volumes, cases: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]],
           rows_BR: torch.Tensor, fields: Mapping[str, slice], crop: Sequence[int]) -> None:  # fmt: skip
    if not len(cases) == len(boxes) == len(rows_BR) > 0:
        raise ValueError(f"{len(cases)} cases, {len(boxes)} boxes and {len(rows_BR)} rows need to be as many, not none")
    for name, value in IDENTITY.items():
        if not bool((rows_BR[:, fields[name]] == value).all()):
            raise ValueError(f"a row asks for {name}, which is no part of this gather")
    still = rows_BR[:, fields["warp"]][:, 0] == 0
    for case, (start, stop), plain in zip(cases, boxes, still.tolist(), strict=True):
        meets = all(max(a, 0) < min(b, n) for a, b, n in zip(start, stop, volumes.sizes[case], strict=True))
        if not meets or (plain and [b - a for a, b in zip(start, stop, strict=True)] != list(crop)):
            raise ValueError(f"box {start} to {stop} does not fit {volumes.sizes[case]} voxels and crop {tuple(crop)}")
