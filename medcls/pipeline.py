"""DALI's pipeline of images: it applies what a sample's row says.

Legend of shapes: B samples of one rank's micro-batch, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from medcls import rows
from medtrain.pipeline import Loader, Source, Told, options


@dataclass(frozen=True)
class ImageBatch:
    """One micro-batch: image (B,3,H,W) float32 normalised, target (B,) int64, mix (B,) float32, key (B,2)."""

    image_BCHW: torch.Tensor
    target_B: torch.Tensor
    mix_B: torch.Tensor
    key_B2: torch.Tensor

    @property
    def inputs(self) -> torch.Tensor:
        """What the network takes."""
        return self.image_BCHW

    def to(self, device: torch.device) -> "ImageBatch":
        """Copy to the device (already there when DALI ran on it)."""
        return ImageBatch(self.image_BCHW.to(device), self.target_B.to(device), self.mix_B.to(device), self.key_B2)


class ImageLoader(Loader):
    """Endless iterator of `ImageBatch`es: a source gives encoded bytes and rows (see `medcls.augment.ImageSource`),
    DALI decodes the wanted part, resizes it to `size` pixels square, flips and turns it, and normalises.

    With `decoded` the source gives (size,size,3) pixels instead. `mean` and `std` are of pixels in 0..1. A CUDA device
    decodes with nvJPEG there. Errors of a source's worker or of decoding come out of `next` as UserError or Failed.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch: int,
        size: int,
        operations: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        decoded: bool = False,
        workers: int = 1,
        threads: int = 1,
        device: torch.device | None = None,
    ):
        how = options(batch, workers, threads, device)
        pipe = _image_pipeline(
            source=Told(source), size=size, decoded=decoded, operations=frozenset(operations),
            mean=[255 * m for m in mean], std=[255 * s for s in std], **how,
        )  # fmt: skip
        super().__init__(pipe, ["image", "target", "row", "key"], how["gpu"])

    def __next__(self) -> ImageBatch:
        out = self._next()
        mix = out["row"][:, rows.layout()["mix"].start]
        return ImageBatch(out["image"], out["target"][:, 0], mix, out["key"].cpu())


def _image_pipeline(source: Any, size: int, decoded: bool, operations: frozenset[str], mean: list[float],
                    std: list[float], gpu: bool, parallel: bool, **options: Any) -> Any:  # fmt: skip
    from nvidia.dali import fn, pipeline_def, types

    at = rows.layout()
    queue: dict[str, Any] = {"prefetch_queue_depth": 2} if parallel else {}

    @pipeline_def(enable_conditionals=True, **options)
    def build() -> Any:
        image, row, target, key = fn.external_source(
            source=source, num_outputs=4, batch=False, parallel=parallel, layout=["HWC" if decoded else "", "", "", ""],
            dtype=[types.UINT8, types.FLOAT, types.INT64, types.INT64], ndim=[3 if decoded else 1, 1, 1, 1], **queue,
        )  # fmt: skip
        if not decoded:
            roi = fn.cast(row[at["roi"].start : at["roi"].stop], dtype=types.INT32)
            image = fn.decoders.image_slice(
                image, start=roi[0:2], shape=roi[2:4], axes=[0, 1], device="mixed" if gpu else "cpu",
                output_type=types.RGB, jpeg_fancy_upsampling=True,
            )  # fmt: skip
            image = fn.resize(image, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
        image = image.gpu() if gpu else image
        image = _turned(image, row, at, size, operations)
        image = fn.crop_mirror_normalize(image, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std)
        if gpu:  # there before the step asks for them
            target, row = target.gpu(), row.gpu()
        return image, target, row, key

    return build()


def _turned(image: Any, row: Any, at: Any, size: int, operations: frozenset[str]) -> Any:
    """Turn, rotation, flips and colours of a resized image."""
    from nvidia.dali import fn, types
    from nvidia.dali import math as dmath

    # nested, not joined by `and`: DALI's conditionals would take the plain boolean for a part of the graph
    if "turn" in operations:  # noqa: SIM102
        if row[at["turn"].start] > 0:
            image = fn.transpose(image, perm=[1, 0, 2], transpose_layout=False)
    if "angle" in operations:  # noqa: SIM102
        if row[at["angle"].start] != 0:
            image = fn.rotate(image, angle=row[at["angle"].start], size=[size, size], fill_value=0)
    if "flip" in operations:
        up, left = (fn.cast(row[at["flip"].start + n], dtype=types.INT32) for n in range(2))
        image = fn.flip(image, vertical=up, horizontal=left)
    if "colour" in operations:
        brightness, contrast, saturation = (row[at["colour"].start + n] for n in range(3))
        # left out where all are 1, as when the source has applied them
        change = dmath.abs(brightness - 1) + dmath.abs(contrast - 1) + dmath.abs(saturation - 1)
        if change > 0:
            image = fn.color_twist(image, brightness=brightness, contrast=contrast, saturation=saturation)
    return image
