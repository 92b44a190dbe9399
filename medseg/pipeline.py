"""DALI's pipeline of volumes: it applies what a sample's row says.

Legend of shapes: B samples of one rank's micro-batch, C channels, D H W voxels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from medseg import rows
from medtrain.pipeline import Loader, Source, Told, options


@dataclass(frozen=True)
class Batch:
    """One micro-batch: image (B,C,D,H,W) float32, label (B,D,H,W) uint8 raw codes, key (B,2) [epoch, index]."""

    image_BCDHW: torch.Tensor
    label_BDHW: torch.Tensor
    key_B2: torch.Tensor

    @property
    def inputs(self) -> torch.Tensor:
        """What the network takes."""
        return self.image_BCDHW

    def to(self, device: torch.device) -> "Batch":
        """Copy to the device (already there when DALI ran on it)."""
        return Batch(self.image_BCDHW.to(device), self.label_BDHW.to(device), self.key_B2)


class VolumeLoader(Loader):
    """Endless iterator of `Batch`es: a source gives patches and rows, DALI warps, flips and filters them.

    `source` is called per sample with DALI's SampleInfo (see `medseg.augment.VolumeSource`). With `workers` > 0 it
    runs in that many processes, which share the cache's pages; 0 runs it in this process. A CUDA device makes the
    operators run there.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch: int,
        channels: int,
        crop: Sequence[int],
        operations: Sequence[str],
        workers: int = 1,
        threads: int = 1,
        device: torch.device | None = None,
    ):
        how = options(batch, workers, threads, device)
        pipe = _volume_pipeline(
            source=Told(source), channels=channels, crop=tuple(crop), operations=frozenset(operations), **how,
        )  # fmt: skip
        super().__init__(pipe, ["image", "label", "key"], how["gpu"])

    def __next__(self) -> Batch:
        out = self._next()
        return Batch(out["image"], out["label"][:, 0], out["key"].cpu())


def _volume_pipeline(source: Any, channels: int, crop: tuple[int, ...], operations: frozenset[str], gpu: bool,
                     parallel: bool, **options: Any) -> Any:  # fmt: skip
    from nvidia.dali import fn, pipeline_def, types

    noisy = "noise" in operations
    count = 5 if noisy else 4
    layouts = ["CDHW", "CDHW", "", "", "CDHW"][:count]
    queue: dict[str, Any] = {"prefetch_queue_depth": 2} if parallel else {}
    dtypes = [types.FLOAT16, types.UINT8, types.FLOAT, types.INT64, types.FLOAT16][:count]

    @pipeline_def(enable_conditionals=True, **options)
    def build() -> Any:
        inputs = fn.external_source(
            source=source, num_outputs=count, batch=False, parallel=parallel, layout=layouts, dtype=dtypes,
            ndim=[4, 4, 1, 1, 4][:count], **queue,
        )  # fmt: skip
        image, label, row, key = inputs[:4]
        noise: Any = inputs[4] if noisy else None
        if gpu:
            image, label = image.gpu(), label.gpu()
            noise = noise.gpu() if noisy else None
        image, label = _geometry(image, label, row, crop, channels, operations)
        image = _filters(image, noise, row, crop, channels, operations)
        return image, label, key

    return build()


def _geometry(image: Any, label: Any, row: Any, crop: tuple[int, ...], channels: int, operations: Any) -> Any:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import do_not_convert

    at = rows.layout(channels)

    @do_not_convert
    def warp(volume: Any, matrix: Any, interpolation: Any) -> Any:
        # warp_affine takes channel-last volumes only, and matrices in x, y, z (W, H, D) order
        last = fn.transpose(volume, perm=[1, 2, 3, 0], transpose_layout=True)
        turned = fn.warp_affine(last, matrix=matrix, size=crop, fill_value=0, interp_type=interpolation)
        return fn.transpose(turned, perm=[3, 0, 1, 2], transpose_layout=True)

    if "warp" in operations:
        image = fn.cast(image, dtype=types.FLOAT)
        flag = fn.cast(row[at["warp"].start], dtype=types.BOOL)
        matrix = fn.reshape(row[at["matrix"].start : at["matrix"].stop], shape=[3, 4])
        matrix = _reverse_axes(matrix)
        if flag:
            image = warp(image, matrix, types.INTERP_LINEAR)
            label = warp(label, matrix, types.INTERP_NN)
    if "flip" in operations:
        d, h, w = (fn.cast(row[at["flip"].start + axis], dtype=types.INT32) for axis in range(3))
        # float16 halves the memory traffic; DALI flips none, so its bits pass as whole numbers
        half = "warp" not in operations
        image = fn.reinterpret(image, dtype=types.INT16) if half else image
        image = fn.flip(image, depthwise=d, vertical=h, horizontal=w)
        image = fn.reinterpret(image, dtype=types.FLOAT16) if half else image
        label = fn.flip(label, depthwise=d, vertical=h, horizontal=w)
    return image, label


def _reverse_axes(matrix: Any) -> Any:
    """(3,4) in D, H, W order -> W, H, D order: rows and the first three columns reversed."""
    from nvidia.dali import fn

    parts = [fn.stack(*[matrix[r][c] for c in (2, 1, 0, 3)]) for r in (2, 1, 0)]
    return fn.stack(*parts)


def _filters(image: Any, noise: Any, row: Any, crop: tuple[int, ...], channels: int, operations: Any) -> Any:
    from nvidia.dali import fn, types
    from nvidia.dali import math as dmath

    at = rows.layout(channels)

    image = fn.cast(image, dtype=types.FLOAT)

    def each(name: str) -> Any:
        return fn.reshape(row[at[name].start : at[name].stop], shape=[channels, 1, 1, 1])

    if "noise" in operations:
        # a conditional, not a product with zero: samples without noise bring a field of one voxel
        level = row[at["noise"].start]
        if level > 0:
            image = image + fn.cast(noise, dtype=types.FLOAT) * level
    if "blur" in operations:
        sigma = row[at["blur"].start]
        if sigma > 0:
            window = 2 * fn.cast(dmath.ceil(3 * sigma), dtype=types.INT32) + 1
            image = fn.gaussian_blur(image, sigma=sigma, window_size=window)
    if "contrast" in operations:
        mean = fn.reductions.mean(image, axes=[1, 2, 3], keep_dims=True)
        image = (image - mean) * each("contrast") + mean
    if "low" in operations:
        factor = row[at["low"].start]
        if factor != 1:
            small = fn.stack(*[dmath.floor(n * factor + 0.5) for n in crop])
            image = fn.resize(image, size=small, interp_type=types.INTERP_LINEAR, antialias=False)
            image = fn.resize(image, size=[float(n) for n in crop], interp_type=types.INTERP_LINEAR, antialias=False)
    if "gamma" in operations:
        least = fn.reductions.min(image, axes=[1, 2, 3], keep_dims=True)
        span = dmath.max(fn.reductions.max(image, axes=[1, 2, 3], keep_dims=True) - least, 1e-6)
        image = span * dmath.pow((image - least) / span, each("gamma")) + least
    if "intensity" in operations:
        image = image * each("scale") + each("shift")
    return image
