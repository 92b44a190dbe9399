"""Parameter rows: one float32 vector holds everything random about a sample, so whoever applies it draws no numbers."""

from collections.abc import Iterable, Mapping

import numpy as np


def slices(sizes: Mapping[str, int]) -> dict[str, slice]:
    """Fields of these sizes one behind another."""
    places, at = {}, 0
    for name, size in sizes.items():
        places[name] = slice(at, at + size)
        at += size
    return places


def filled(places: Mapping[str, slice], ones: Iterable[str], fields: Mapping[str, object]) -> np.ndarray:
    """A row of these fields; what is not given is 1 where `ones` names it, else 0."""
    row = np.zeros(max(where.stop for where in places.values()), np.float32)
    for name in ones:
        row[places[name]] = 1
    for name, value in fields.items():
        row[places[name]] = np.ravel(np.asarray(value, np.float32))
    return row
