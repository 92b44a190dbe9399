"""Decoding, resizing and colours on the CPU by OpenCV and torch, twice as fast there as DALI; on a GPU DALI does them.

Legend of shapes: H W the file's pixels, S the square that a network takes.
"""

import multiprocessing
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch.nn import functional

from medcls import rows

# ITU-R BT.601 luma, in thousandths as DALI takes it
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def one_thread() -> None:
    """In a loader's worker, whose parallelism is the processes, use one thread; elsewhere all that there are."""
    if multiprocessing.parent_process() is not None:
        cv2.setNumThreads(1)
        torch.set_num_threads(1)


def decoded(encoded: np.ndarray, roi: Sequence[int], size: int) -> np.ndarray:
    """The part `roi` (top, left, height, width) of an encoded image as (S,S,3) uint8 RGB; raises ValueError.

    Upright by EXIF; triangular filter when shrinking, as in Pillow (to one grey level) and DALI.
    """
    # the cache has seen to the format and size that these bytes tell: see `ImageCache.encoded`
    # RGB would be made of all pixels; it costs a third less on the few of the square
    image_HWC = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    if image_HWC is None:
        raise ValueError("these bytes are no image that OpenCV decodes")
    top, left, height, width = (int(v) for v in roi)
    part = torch.from_numpy(image_HWC[top : top + height, left : left + width]).permute(2, 0, 1)[None]
    square = functional.interpolate(part, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return cv2.cvtColor(np.ascontiguousarray(square[0].permute(1, 2, 0).numpy()), cv2.COLOR_BGR2RGB)


def coloured(image_SSC: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Brightness, contrast and saturation (3,) applied as one 3 x 4 matrix: see `medcls.augment.apply`."""
    brightness, contrast, saturation = (float(v) for v in colour)
    gain = brightness * contrast
    matrix = np.empty((3, 4), np.float32)
    matrix[:, :3] = gain * (saturation * np.eye(3) + (1 - saturation) * LUMA)
    matrix[:, 3] = 127.5 * (brightness - gain)
    return cv2.transform(image_SSC, matrix)


def prepared(encoded: np.ndarray, row: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(image (S,S,3) uint8, row of what is left to do) of a sample.

    Colours wait where a rotation comes first, because they change the black that it brings in.
    """
    at = rows.layout()
    image = decoded(encoded, row[at["roi"]].tolist(), size)
    left = row.copy()
    left[at["roi"]] = 0, 0, size, size
    if row[at["angle"]][0] == 0 and np.any(row[at["colour"]] != 1):
        image = coloured(image, row[at["colour"]])
        left[at["colour"]] = 1
    return image, left
