"""DALI pipelines over the cache: they apply what a sample's row says. The only file that imports DALI.

Legend of shapes: B samples of one rank's micro-batch, C channels, D H W voxels.
"""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch

from medtrain import rows
from medtrain.errors import Failed, UserError
from medtrain.processes import Watch


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


def _options(batch: int, workers: int, threads: int, device: torch.device | None) -> dict[str, Any]:
    """What every pipeline is built with; `gpu` and `parallel` tell its operators where they run."""
    gpu = device is not None and device.type == "cuda"
    return {
        "gpu": gpu, "parallel": workers > 0, "batch_size": batch, "num_threads": threads,
        "device_id": (device.index or 0) if gpu and device is not None else None,
        "py_num_workers": max(1, workers), "py_start_method": "spawn", "prefetch_queue_depth": 2,
    }  # fmt: skip


def _endless(pipe: Any, names: list[str]) -> Any:
    """An iterator over the batches of a pipeline as lists of one dictionary of tensors."""
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    return DALIGenericIterator([pipe], names, size=-1, auto_reset=False, prepare_first_batch=False,
                               last_batch_policy=LastBatchPolicy.PARTIAL)  # fmt: skip


class BatchHolder:
    """Holds batches on a GPU until the device has done with what was asked of it while they were the newest.

    torch reads DALI's own memory, and DALI fills memory again as soon as torch lets go of it: it waits for nothing that
    is still queued on torch's stream, and the host is steps ahead of the device. At most `MOST` are held.
    """

    MOST = 2

    def __init__(self) -> None:
        self._newest: Any = None
        self._older: deque[tuple[Any, Any]] = deque()

    def take(self, batch: Any) -> Any:
        """Hold this batch; let go of older ones that the device has done with."""
        if self._newest is not None:
            done = torch.cuda.Event()
            done.record()
            self._older.append((done, self._newest))
        while self._older and (len(self._older) > self.MOST or self._older[0][0].query()):
            self._older[0][0].synchronize()
            self._older.popleft()
        self._newest = batch
        return batch


class Loader:
    """Iterates over a pipeline's batches; an error of the source names the case, a dead worker ends the wait for it."""

    def __init__(self, pipe: Any, names: list[str], gpu: bool = False):
        self._iterator = _endless(pipe, names)
        self._kept = BatchHolder() if gpu else None
        self._watch = Watch(getattr(getattr(pipe._py_pool, "pool", None), "_processes", []))

    def __iter__(self) -> Self:
        return self

    def _next(self) -> Any:
        try:
            with self._watch.waiting():
                (out,) = next(self._iterator)
        except Exception as error:  # DALI raises RuntimeError and plain Exception
            found = TOLD.findall(str(error))
            if found:  # the last one: the text may quote the line below that raises it
                case, words = found[-1]
                if words.startswith("UserError: "):
                    raise UserError(words.removeprefix("UserError: ")) from None
                raise Failed(f"case {case} can not be loaded: {words}") from None
            dead = self._watch.verdict()
            if dead:
                raise Failed(dead) from None
            raise
        return self._kept.take(out) if self._kept else out


# How a worker tells the main process, through the text of DALI's error, which case it was about.
TOLD = re.compile(r"<case (.*?)> (.*?) </case>", re.DOTALL)


class Source(Protocol):
    """What gives DALI its samples: arrays, by DALI's SampleInfo."""

    def __call__(self, info: Any) -> tuple[np.ndarray, ...]: ...

    def case_at(self, number: int) -> str:
        """The case that the sample of this number is of, for messages."""


@dataclass
class Told:
    """A source whose errors name the case."""

    source: Source

    def __call__(self, info: Any) -> tuple[np.ndarray, ...]:
        try:
            return self.source(info)
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"<case {self.source.case_at(info.idx_in_epoch)}> {words} </case>") from None


def _check_dali() -> None:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"NVIDIA DALI can not be loaded ({error}): python -m pip install -c constraints.txt nvidia-dali-cuda130."
        ) from None


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
        _check_dali()
        options = _options(batch, workers, threads, device)
        pipe = _volume_pipeline(
            source=Told(source), channels=channels, crop=tuple(crop), operations=frozenset(operations), **options,
        )  # fmt: skip
        super().__init__(pipe, ["image", "label", "key"], options["gpu"])

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
        _check_dali()
        options = _options(batch, workers, threads, device)
        pipe = _image_pipeline(
            source=Told(source), size=size, decoded=decoded, operations=frozenset(operations),
            mean=[255 * m for m in mean], std=[255 * s for s in std], **options,
        )  # fmt: skip
        super().__init__(pipe, ["image", "target", "row", "key"], options["gpu"])

    def __next__(self) -> ImageBatch:
        out = self._next()
        mix = out["row"][:, rows.image_layout()["mix"].start]
        return ImageBatch(out["image"], out["target"][:, 0], mix, out["key"].cpu())


def _image_pipeline(source: Any, size: int, decoded: bool, operations: frozenset[str], mean: list[float],
                    std: list[float], gpu: bool, parallel: bool, **options: Any) -> Any:  # fmt: skip
    from nvidia.dali import fn, pipeline_def, types

    at = rows.image_layout()
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
