"""Between a scan's own grid and the canonical, cropped, resampled grid of the cache, both ways.

Legend of shapes: X Y Z the file's voxel axes; D H W the canonical axes (to the right, to the front, upwards).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import nibabel as nib
import numpy as np
from scipy import ndimage

# A crop box is grown to this many voxels where the image allows, so that 128^3 crops of tight brains exist.
MINIMUM_BOX = 128


@dataclass(frozen=True)
class Grid:
    """All that leads from the cache back to the file: orientation, crop box, sizes, affine and header.

    `flips_axes` is nibabel's orientation transform (3,2) from the file's axes to canonical ones; `start`, `stop`
    are the crop box in canonical voxels; `size` is the cropped, resampled size in the cache.
    """

    shape_XYZ: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    flips_axes: tuple[tuple[int, int], ...]
    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    size: tuple[int, int, int]
    header: str  # the 348 header bytes as hexadecimal

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values, kept with the case."""
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Self:
        """Read `to_dict`'s value back (JSON turns tuples into lists)."""
        return cls(**{key: _tuples(item) for key, item in value.items()})

    @property
    def native(self) -> tuple[int, int, int]:
        """Size of the crop box at the file's own spacing, in canonical axes."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))  # type: ignore[return-value]

    @property
    def voxel_mm(self) -> tuple[float, float, float]:
        """Size of the file's own voxels along the canonical axes."""
        sizes = np.abs(nib.affines.voxel_sizes(np.array(self.affine)))
        return tuple(sizes[np.argsort(np.asarray(self.flips_axes)[:, 0])].tolist())


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def orientation(affine: np.ndarray) -> np.ndarray:
    """nibabel's (3,2) transform of a file's axes to canonical (RAS+) order."""
    return nib.orientations.io_orientation(affine).astype(int)


def to_canonical(array: np.ndarray, flips_axes: Any) -> np.ndarray:
    """Turn and flip the first three axes to canonical order; no interpolation."""
    return nib.orientations.apply_orientation(array, np.asarray(flips_axes))


def from_canonical(array_DHW: np.ndarray, flips_axes: Any) -> np.ndarray:
    """The inverse of `to_canonical` for the first three axes."""
    back = nib.orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), np.asarray(flips_axes))
    return nib.orientations.apply_orientation(array_DHW, back)


def bounding_box(mask_DHW: np.ndarray, minimum: int = MINIMUM_BOX) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(start, stop) of the true voxels, grown evenly to `minimum` voxels an axis where the volume is that large."""
    start, stop = [], []
    for axis, length in enumerate(mask_DHW.shape):
        others = tuple(a for a in range(3) if a != axis)
        line = np.flatnonzero(mask_DHW.any(axis=others))
        low, high = (int(line[0]), int(line[-1]) + 1) if line.size else (0, length)
        missing = max(0, min(minimum, length) - (high - low))
        low = min(max(0, low - missing // 2), length - max(high - low, min(minimum, length)))
        start.append(low)
        stop.append(max(high, low + min(minimum, length)))
    return tuple(start), tuple(stop)


def resampled_size(
    native: Sequence[int], voxel_mm: Sequence[float], wanted_mm: Sequence[float]
) -> tuple[int, int, int]:
    """Voxels an axis after resampling to `wanted_mm`; the extent is kept, so the true spacing is off by < 1 voxel."""
    sizes = zip(native, voxel_mm, wanted_mm, strict=True)
    return tuple(max(1, round(n * mm / wanted)) for n, mm, wanted in sizes)  # type: ignore[return-value]


def resample_image(image_CDHW: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Linear resampling of each channel to `size`, after a Gaussian against aliasing where it gets coarser."""
    factors = [n / m for n, m in zip(image_CDHW.shape[1:], size, strict=True)]
    sigma = [max(0.0, (factor - 1) / 2) for factor in factors]
    out = np.empty((image_CDHW.shape[0], *size), np.float32)
    for channel, volume in enumerate(image_CDHW):
        smooth = ndimage.gaussian_filter(volume, sigma) if any(sigma) else volume
        out[channel] = _zoom(smooth, size)
    return out


def resample_label(label_DHW: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The code with the largest share in each new voxel (linear resampling of each code's mask)."""
    best = np.full(size, -1, np.float32)
    out = np.zeros(size, label_DHW.dtype)
    for code in np.unique(label_DHW):
        share = resample_image((label_DHW == code)[None].astype(np.float32), size)[0]
        larger = share > best
        best[larger], out[larger] = share[larger], code
    return out


def _zoom(volume: np.ndarray, size: Sequence[int]) -> np.ndarray:
    factors = [m / n for n, m in zip(volume.shape, size, strict=True)]
    out = np.empty(tuple(size), np.float32)
    # grid_mode: the volumes' outer edges coincide, not their first and last voxel centres
    return ndimage.zoom(volume, factors, output=out, order=1, mode="nearest", grid_mode=True)


def paste(label_DHW: np.ndarray, grid: Grid) -> np.ndarray:
    """A label at native spacing in the crop box -> the file's own grid (X,Y,Z), zero outside the box."""
    if label_DHW.shape != grid.native:
        raise ValueError(f"label is {label_DHW.shape}, the crop box {grid.native}")
    order = np.asarray(grid.flips_axes)[:, 0]
    full = np.zeros([grid.shape_XYZ[int(np.flatnonzero(order == axis)[0])] for axis in range(3)], label_DHW.dtype)
    full[tuple(slice(a, b) for a, b in zip(grid.start, grid.stop, strict=True))] = label_DHW
    return np.ascontiguousarray(from_canonical(full, grid.flips_axes))


def to_nifti(label_XYZ: np.ndarray, grid: Grid) -> nib.Nifti1Image:
    """A label map as a NIfTI image with the scan's own affine and header."""
    header = nib.Nifti1Header(bytes.fromhex(grid.header), check=False)
    header.set_data_dtype(np.uint8)
    image = nib.Nifti1Image(label_XYZ.astype(np.uint8), np.array(grid.affine), header)
    image.header.set_slope_inter(1, 0)
    # the scan's display range would show a label map black
    image.header["cal_min"] = image.header["cal_max"] = 0
    return image
