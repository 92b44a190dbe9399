"""Random crops and augmentation of volumes: drawn here as parameter rows; `apply` is the plain NumPy reference.

Random crop, flips, intensity shift and scale are those of A. Myronenko, "3D MRI brain tumor segmentation using
autoencoder regularization", 2018; the recipes add rotations, and the fuller set follows nnU-Net (Isensee et al., 2021).

Legend of shapes: C channels, D H W canonical axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage

from medseg import rows
from medseg.cache import Cache
from medtrain.processes import stay_with_parent
from medtrain.recipe import within
from medtrain.sampling import Stream, generator


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Probabilities and ranges; an operation with probability 0 is left out. Angles in degrees, sigma in voxels."""

    flip: float = within(0.5, 0, most=1)  # per axis
    flip_axes: tuple[int, ...] = within((0, 1, 2), 0, most=2)  # 0 left-right, 1 front-back, 2 up-down
    shift: float = within(0.1, 0, most=100)  # added per channel, uniform in [-shift, shift]
    scale: float = within(0.1, 0, most=1)  # per channel, uniform in [1 - scale, 1 + scale]
    rotate: float = within(0.0, 0, most=1)
    degrees: float = within(15.0, 0, most=180)  # per axis, uniform in [-degrees, degrees]
    zoom: float = within(0.0, 0, most=1)
    zoom_range: tuple[float, float] = within((0.8, 1.25), 0.1, most=10, ordered=True)
    noise: float = within(0.0, 0, most=1)
    noise_std: float = within(0.2, 0, most=100)
    blur: float = within(0.0, 0, most=1)
    blur_sigma: tuple[float, float] = within((0.5, 1.0), 0, most=10, ordered=True)
    contrast: float = within(0.0, 0, most=1)
    contrast_range: tuple[float, float] = within((0.75, 1.25), 0, most=10, ordered=True)
    low_resolution: float = within(0.0, 0, most=1)
    low_range: tuple[float, float] = within((0.5, 1.0), 0.05, most=1, ordered=True)
    gamma: float = within(0.0, 0, most=1)
    gamma_range: tuple[float, float] = within((0.7, 1.5), 0.1, most=10, ordered=True)

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations that can occur, in the order of `rows.ORDER`."""
        on = {
            "warp": self.rotate > 0 or self.zoom > 0,
            "flip": self.flip > 0 and bool(self.flip_axes),
            "noise": self.noise > 0,
            "blur": self.blur > 0,
            "contrast": self.contrast > 0,
            "low": self.low_resolution > 0,
            "gamma": self.gamma > 0,
            "intensity": self.scale > 0 or self.shift > 0,
        }
        return tuple(name for name in rows.ORDER if on[name])


@dataclass(frozen=True)
class Draw:
    """One drawn sample: the box to read (zero where it leaves the volume), the row to apply, and the seed of its
    noise field."""

    case: str
    start: tuple[int, ...]
    stop: tuple[int, ...]
    row: np.ndarray
    noise_seed: int


def rotation(angles: Sequence[float]) -> np.ndarray:
    """Rotation matrix (3,3) about the D, then H, then W axis; angles in radians."""
    out = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = [i for i in range(3) if i != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        out = turn @ out
    return out


def draw(rng: np.random.Generator, augment: Augment, channels: int, case: str, size: Sequence[int],
         crop: Sequence[int], focus: np.ndarray | None) -> Draw:  # fmt: skip
    """Draw one sample of a case of `size` voxels.

    `focus` is a voxel that the crop must hold (foreground-biased crop); None draws the corner uniformly. A case that is
    smaller than the crop on an axis lies in the middle of it, as in the sliding window. The numbers
    are drawn in a fixed order whether used or not, so that one option does not change another's draws.
    """
    sizes, crops = np.asarray(size), np.asarray(crop)
    u = rng.random(3)
    lacks = np.maximum(crops - sizes, 0)
    first, last = -(lacks // 2), sizes - crops + lacks - lacks // 2  # the same where it lacks voxels
    if focus is None:
        corner = first + np.floor(u * (last - first + 1)).astype(int)
    else:
        # the voxel falls anywhere in the middle half of the crop, so that tumour borders are seen on all sides
        corner = np.asarray(focus) - np.floor(crops * (0.25 + 0.5 * u)).astype(int)
        corner = np.clip(corner, first, last)
    linear = _linear(rng, augment)
    fields: dict[str, object] = {}
    flips = rng.random(3) < augment.flip
    fields["flip"] = [bool(flips[axis] and axis in augment.flip_axes) for axis in range(3)]
    fields["scale"] = 1 + augment.scale * rng.uniform(-1, 1, channels)
    fields["shift"] = augment.shift * rng.uniform(-1, 1, channels)
    fields |= _filters(rng, augment, channels)
    start, stop = corner, corner + crops
    if linear is not None:
        start, stop, fields["matrix"] = _read_box(linear, corner, crops, sizes)
        fields["warp"] = 1
    seed = int(rng.integers(2**31))
    return Draw(case, tuple(map(int, start)), tuple(map(int, stop)), rows.pack(fields, channels), seed)


def _linear(rng: np.random.Generator, augment: Augment) -> np.ndarray | None:
    """The 3x3 part of output -> input, or None where neither rotation nor zoom was drawn."""
    turn, angles = rng.random() < augment.rotate, np.radians(augment.degrees) * rng.uniform(-1, 1, 3)
    scaled, exponent = rng.random() < augment.zoom, rng.random()
    if not turn and not scaled:
        return None
    low, high = augment.zoom_range
    factor = low * (high / low) ** exponent if scaled else 1.0
    return (rotation(angles) if turn else np.eye(3)) / factor


def _filters(rng: np.random.Generator, augment: Augment, channels: int) -> dict[str, object]:
    """Noise, blur, contrast, low resolution and gamma of one sample."""
    chance, amount = rng.random(5), rng.random(3)
    contrast, gamma = rng.random(channels), rng.random(channels)
    low, high = augment.blur_sigma
    fields: dict[str, object] = {}
    if chance[0] < augment.noise:
        fields["noise"] = augment.noise_std * amount[0]
    if chance[1] < augment.blur:
        fields["blur"] = low + (high - low) * amount[1]
    if chance[2] < augment.contrast:
        fields["contrast"] = augment.contrast_range[0] + np.ptp(augment.contrast_range) * contrast
    if chance[3] < augment.low_resolution:
        fields["low"] = augment.low_range[0] + np.ptp(augment.low_range) * amount[2]
    if chance[4] < augment.gamma:
        fields["gamma"] = augment.gamma_range[0] + np.ptp(augment.gamma_range) * gamma
    return fields


def _read_box(
    linear: np.ndarray, corner: np.ndarray, crops: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The part of the volume that a warped crop can touch, and the 3x4 matrix into it (voxel centres at .5)."""
    centre = corner + crops / 2
    offset = centre - linear @ (crops / 2)
    corners = np.array(np.meshgrid(*[(0, n) for n in crops], indexing="ij")).reshape(3, -1)
    reached = linear @ corners + offset[:, None]
    # one voxel more on each side for linear interpolation
    start = np.clip(np.floor(reached.min(1)).astype(int) - 1, 0, sizes - 1)
    stop = np.clip(np.ceil(reached.max(1)).astype(int) + 1, start + 1, sizes)
    return start, stop, np.concatenate([linear, (offset - start)[:, None]], axis=1)


@dataclass
class VolumeSource:
    """One augmented sample's ingredients per call, for DALI's parallel external source: picklable, opens the cache
    in the worker. With `warps` it applies a row's matrix itself (on the CPU that is faster than in DALI) and clears
    `warp` in the row that it hands on.

    Returns image (C,d,h,w) float16, label (1,d,h,w) uint8, row, key (2,) int64 [epoch, index], and, if the recipe has
    noise, the unit noise field (C,D,H,W) float16, or (1,1,1,1) zeros where none was drawn.
    """

    cache: str
    cases: tuple[str, ...]
    crop: tuple[int, int, int]
    augment: Augment
    stream: Stream
    foreground: float = 0.0
    crops_per_case: int = 1
    warps: bool = True
    verify: bool = False

    @cached_property
    def opened(self) -> Cache:
        """The cache, which every process opens for itself."""
        stay_with_parent()
        return Cache(self.cache, self.verify)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "opened"}

    def draw(self, epoch: int, index: int) -> Draw:
        """The sample `index` of `epoch`: its case, box and row; a pure function of the seed and these two."""
        cache = self.opened
        case = self.cases[self.stream.sample(epoch, index) // self.crops_per_case]
        rng = generator(self.stream.seed, epoch, index)
        focus = self._focus(cache, rng, case)
        image = cache.array(case, "image")
        return draw(rng, self.augment, image.shape[0], case, image.shape[1:], self.crop, focus)

    def case_at(self, number: int) -> str:
        """The case of this rank's sample `number`."""
        epoch, index = self.stream.epoch_and_index(number)
        return self.cases[self.stream.sample(epoch, index) // self.crops_per_case]

    def _focus(self, cache: Cache, rng: np.random.Generator, case: str) -> np.ndarray | None:
        biased, pick, at = rng.random() < self.foreground, rng.random(), rng.random()
        names = [f"voxels_{cache.labels[role]}" for role in ("edema", "core", "enhancing")]
        present = [name for name in names if cache.array(case, name).shape[0]]
        if not biased or not present:
            return None
        voxels = cache.array(case, present[int(pick * len(present))])
        return np.asarray(voxels[int(at * voxels.shape[0])], int)

    def __call__(self, info: object) -> tuple[np.ndarray, ...]:
        """DALI's call: `info.idx_in_epoch` counts this rank's samples without end."""
        epoch, index = self.stream.epoch_and_index(info.idx_in_epoch)  # type: ignore[attr-defined]
        sample = self.draw(epoch, index)
        cache = self.opened
        image = cache.patch(sample.case, "image", sample.start, sample.stop)
        label = cache.patch(sample.case, "label", sample.start, sample.stop)
        row, at = sample.row, rows.layout(image.shape[0])
        if self.warps and row[at["warp"]]:
            from medseg.warp import warp

            image, label = warp(image, label, row[at["matrix"]], self.crop)
            row = row.copy()
            row[at["warp"]] = 0
        key = np.array([epoch, index], np.int64)
        if "noise" not in self.augment.operations:
            return image, label[None], row, key
        return image, label[None], row, key, noise_field(sample, image.shape[0], self.crop)


def noise_field(sample: Draw, channels: int, crop: Sequence[int]) -> np.ndarray:
    """Unit Gaussian noise (C,D,H,W) float16 of a sample, or (1,1,1,1) zeros where its row has none."""
    if sample.row[rows.layout(channels)["noise"]] == 0:
        return np.zeros((1, 1, 1, 1), np.float16)
    rng = np.random.default_rng(sample.noise_seed)
    return rng.standard_normal((channels, *crop), np.float32).astype(np.float16)


def apply(image_CDHW: np.ndarray, label_DHW: np.ndarray, row: np.ndarray, noise_CDHW: np.ndarray,
          crop: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Apply a row in plain NumPy and SciPy: the reference for the DALI pipeline. Returns float32 image and label."""
    at = {name: row[where] for name, where in rows.layout(image_CDHW.shape[0]).items()}
    image, label = image_CDHW.astype(np.float32), label_DHW
    if at["warp"][0]:
        image = np.stack([_warp(volume, at["matrix"], crop, order=1) for volume in image])
        label = _warp(label, at["matrix"], crop, order=0)
    axes = tuple(axis for axis in range(3) if at["flip"][axis])
    image, label = np.flip(image, tuple(axis + 1 for axis in axes)), np.flip(label, axes)
    if at["noise"][0]:
        image = image + at["noise"][0] * noise_CDHW.astype(np.float32)
    if at["blur"][0]:
        sigma, radius = float(at["blur"][0]), int(np.ceil(3 * at["blur"][0]))
        image = np.stack([ndimage.gaussian_filter(v, sigma, mode="mirror", radius=radius) for v in image])
    each = (slice(None), None, None, None)
    mean = image.mean(axis=(1, 2, 3), keepdims=True)
    image = (image - mean) * at["contrast"][each] + mean
    if at["low"][0] != 1:
        image = _low_resolution(image, float(at["low"][0]))
    if np.any(at["gamma"] != 1):
        least = image.min(axis=(1, 2, 3), keepdims=True)
        span = np.maximum(image.max(axis=(1, 2, 3), keepdims=True) - least, 1e-6)
        image = span * ((image - least) / span) ** at["gamma"][each] + least
    return image * at["scale"][each] + at["shift"][each], np.ascontiguousarray(label)


def _warp(volume: np.ndarray, matrix: np.ndarray, crop: Sequence[int], order: int) -> np.ndarray:
    linear, offset = matrix.reshape(3, 4)[:, :3], matrix.reshape(3, 4)[:, 3]
    # from voxel centres at .5 (DALI) to voxel centres at whole numbers (SciPy)
    shifted = linear @ np.full(3, 0.5) + offset - 0.5
    return ndimage.affine_transform(volume, linear, shifted, tuple(crop), order=order, mode="grid-constant")


def _low_resolution(image_CDHW: np.ndarray, factor: float) -> np.ndarray:
    """Linear sampling, without smoothing, down to `factor` of the size and up again; outer edges coincide."""
    sizes = image_CDHW.shape[1:]
    smalls = [max(1, int(np.floor(np.float32(length) * np.float32(factor) + np.float32(0.5)))) for length in sizes]
    for old, new in ((sizes, smalls), (smalls, sizes)):
        zooms = [b / a for a, b in zip(old, new, strict=True)]
        image_CDHW = np.stack([ndimage.zoom(v, zooms, order=1, mode="nearest", grid_mode=True) for v in image_CDHW])
    return image_CDHW
