"""The parameter row of an augmented image: the one float32 vector that DALI and NumPy both read.

Operations are applied in this order; each is the identity at the value given in brackets:

    roi     (4)  top, left, height, width in pixels of the upright image; resized to the square [all of it]
    turn    (1)  exchange rows and columns [0]
    angle   (1)  degrees of rotation about the centre, counter-clockwise; outside is black [0]
    flip    (2)  reverse rows, columns [0]
    colour  (3)  brightness, contrast, saturation: see `medcls.augment.apply` [1]
    mix     (1)  share of the image itself where it is mixed with its partner, by the task and not the loader [1]
"""

from collections.abc import Mapping

import numpy as np

from medtrain.rows import filled, slices

FIELDS = {"roi": 4, "turn": 1, "angle": 1, "flip": 2, "colour": 3, "mix": 1}
ORDER = ("turn", "angle", "flip", "colour", "mix")


def layout() -> dict[str, slice]:
    """Where each field lies in an image's row."""
    return slices(FIELDS)


def pack(fields: Mapping[str, object]) -> np.ndarray:
    """An image's row from its fields; what is not given is the identity. `roi` must be given."""
    return filled(layout(), ("colour", "mix"), fields)
