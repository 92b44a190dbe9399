"""Random crops and augmentation of images: drawn here as parameter rows; `apply` is the plain reference.

Random-resized crops follow Szegedy et al., "Going deeper with convolutions", 2015; mixup Zhang et al., 2018.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from medcls import rows
from medcls.cache import ImageCache
from medtrain.processes import stay_with_parent
from medtrain.recipe import within
from medtrain.sampling import Stream, generator


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Probabilities and ranges; what is 0 (or `scale` and `ratio` 1) is left out. Angles in degrees.

    `scale` is the share of the area that a crop takes, `ratio` how much wider or narrower it may be; brightness,
    contrast and saturation are drawn in [1 - x, 1 + x]. `mixup` is the alpha of its Beta distribution.
    """

    scale: tuple[float, float] = within((0.6, 1.0), 0.01, most=1, ordered=True)
    ratio: tuple[float, float] = within((0.8, 1.25), 0.1, most=10, ordered=True)
    flip: float = within(0.5, 0, most=1)  # per axis
    flip_axes: tuple[int, ...] = within((0, 1), 0, most=1)  # 0 up-down, 1 left-right
    turn: float = within(
        0.0, 0, most=1
    )  # exchange of rows and columns; with both flips, all eight symmetries of a square
    angle: float = within(0.0, 0, most=1)
    degrees: float = within(20.0, 0, most=180)
    brightness: float = within(0.0, 0, most=1)
    contrast: float = within(0.0, 0, most=1)
    saturation: float = within(0.0, 0, most=1)
    mixup: float = within(0.0, 0)

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations that can occur, in the order of `rows.ORDER`."""
        on = {
            "turn": self.turn > 0,
            "angle": self.angle > 0,
            "flip": self.flip > 0 and bool(self.flip_axes),
            "colour": max(self.brightness, self.contrast, self.saturation) > 0,
            "mix": self.mixup > 0,
        }
        return tuple(name for name in rows.ORDER if on[name])


def whole(size: Sequence[int]) -> np.ndarray:
    """The row that takes the whole image and changes nothing else."""
    return rows.pack({"roi": (0, 0, *size)})


def draw(rng: np.random.Generator, augment: Augment, size: Sequence[int]) -> np.ndarray:
    """The row of one sample of an image of `size` (height, width) pixels.

    The numbers are drawn in a fixed order whether used or not, so that one option does not change another's draws.
    """
    fields: dict[str, object] = {"roi": _roi(rng, augment, int(size[0]), int(size[1]))}
    chance, amount = rng.random(4), rng.uniform(-1, 1, 4)
    fields["flip"] = [bool(chance[axis] < augment.flip and axis in augment.flip_axes) for axis in range(2)]
    fields["turn"] = chance[2] < augment.turn
    fields["angle"] = augment.degrees * amount[0] if chance[3] < augment.angle else 0.0
    limits = (augment.brightness, augment.contrast, augment.saturation)
    fields["colour"] = [1 + limit * amount[1 + n] for n, limit in enumerate(limits)]
    if augment.mixup > 0:
        share = float(rng.beta(augment.mixup, augment.mixup))
        fields["mix"] = max(share, 1 - share)  # an image stays mostly itself, so its partner's draw is independent
    return rows.pack(fields)


def _roi(rng: np.random.Generator, augment: Augment, height: int, width: int) -> tuple[int, int, int, int]:
    area, shape, top, left = rng.random(4)
    low, high = augment.ratio
    ratio = low * (high / low) ** shape
    scale = augment.scale[0] + (augment.scale[1] - augment.scale[0]) * area
    # of the image's own proportions, so that scale 1 and ratio 1 take all of it
    h = max(1, min(height, round(height * math.sqrt(scale / ratio))))
    w = max(1, min(width, round(width * math.sqrt(scale * ratio))))
    return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w


@dataclass
class ImageSource:
    """One sample's encoded bytes, row, target and key per call, for DALI's external source: picklable, opens the cache
    in the worker. `images` are indices into the cache, `targets` their classes; samples are drawn without end in the
    stream's order. With `size` it decodes, resizes and colours itself (on the CPU that is faster than in DALI) and
    hands on pixels and the row of what is left.
    """

    cache: str
    images: np.ndarray
    targets: np.ndarray
    augment: Augment
    stream: Stream
    size: int = 0
    verify: bool = False

    @cached_property
    def opened(self) -> ImageCache:
        """The cache, which every process opens for itself."""
        stay_with_parent()
        if self.size:
            from medcls.pixels import one_thread

            one_thread()
        return ImageCache(self.cache, self.verify)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "opened"}

    def draw(self, epoch: int, index: int) -> tuple[int, np.ndarray]:
        """(place in `images`, row) of the sample `index` of `epoch`: a pure function of the seed and these two."""
        place = self.stream.sample(epoch, index)
        size = self.opened.size[self.images[place]]
        return place, draw(generator(self.stream.seed, epoch, index), self.augment, size)

    def case_at(self, number: int) -> str:
        """The path of this rank's image `number`."""
        place = self.stream.sample(*self.stream.epoch_and_index(number))
        return self.opened.ids[self.images[place]]

    def __call__(self, info: object) -> tuple[np.ndarray, ...]:
        """DALI's call: bytes (length,) or pixels (size,size,3) uint8, row float32, target (1,) int64, key (2,) int64
        [epoch, index].
        """
        epoch, index = self.stream.epoch_and_index(info.idx_in_epoch)  # type: ignore[attr-defined]
        place, row = self.draw(epoch, index)
        image = self.opened.encoded(self.images[place])
        if self.size:
            from medcls.pixels import prepared

            image, row = prepared(image, row, self.size)
        return image, row, self.targets[place : place + 1], np.array([epoch, index], np.int64)


@dataclass
class WholeImages:
    """`count` whole images one after the other, and from the beginning again, for DALI's external source in the same
    process: `read` gives the encoded bytes (length,) uint8 and the height and width of the n-th, `name` what it is
    called in messages.
    """

    count: int
    read: Callable[[int], tuple[np.ndarray, Sequence[int]]]
    name: Callable[[int], str]

    def case_at(self, number: int) -> str:
        """Which image a sample is of."""
        return self.name(number % self.count)

    def __call__(self, info: object) -> tuple[np.ndarray, ...]:
        """DALI's call: bytes, row, and zeros in place of target and key."""
        encoded, size = self.read(info.idx_in_epoch % self.count)  # type: ignore[attr-defined]
        return encoded, whole(size), np.zeros(1, np.int64), np.zeros(2, np.int64)


def apply(image_HWC: np.ndarray, row: np.ndarray, size: int) -> np.ndarray:
    """Apply a row with Pillow and NumPy: the reference for the DALI pipeline; (size,size,3) float32 in 0..255.

    Colour: x <- (saturation x + (1 - saturation) luma - 127.5) contrast brightness + 127.5 brightness, clipped.
    """
    from PIL import Image

    from medcls.pixels import LUMA

    at = {name: row[where] for name, where in rows.layout().items()}
    top, left, height, width = (int(v) for v in at["roi"])
    image = Image.fromarray(image_HWC[top : top + height, left : left + width])
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    if at["turn"][0]:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    out = np.asarray(image)
    if at["angle"][0]:
        out = _rotated(out, float(at["angle"][0]))
    out = np.flip(out, tuple(axis for axis in range(2) if at["flip"][axis])).astype(np.float32)
    brightness, contrast, saturation = at["colour"]
    if np.any(at["colour"] != 1):
        luma = (out @ LUMA)[..., None]
        out = saturation * out + (1 - saturation) * luma
        out = np.clip(np.rint(((out - 127.5) * contrast + 127.5) * brightness), 0, 255)
    return out


def _rotated(image_HWC: np.ndarray, degrees: float) -> np.ndarray:
    """Counter-clockwise about the centre, linear; outside is black."""
    from scipy import ndimage

    turn = math.radians(degrees)
    matrix = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    centre = (np.array(image_HWC.shape[:2]) - 1) / 2
    offset = centre - matrix @ centre
    planes = [
        ndimage.affine_transform(image_HWC[..., c].astype(np.float32), matrix, offset, order=1, mode="grid-constant")
        for c in range(3)
    ]
    return np.rint(np.stack(planes, -1)).astype(np.uint8)
