"""Batches from volumes that stay on the device: after the start no file is read for a crop and nothing but rows copied.

The samples are those of the DALI pipeline: same order, same boxes, same parameter rows.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import torch

from medkernels.augment import Volumes, augment
from medseg import rows
from medseg.augment import Draw, VolumeSource
from medseg.cache import Cache
from medseg.pipeline import Batch
from medseg.recipes import SegRecipe
from medtrain.errors import UserError

GATHERED = {"warp", "flip", "intensity"}  # what one gather can do
SHARE = 0.25  # of the free memory of a GPU that volumes may take unasked


def stays(recipe: SegRecipe, cache: Cache, cases: Sequence[str], device: torch.device) -> bool:
    """Whether the recipe's volumes are to stay on the device: `data.resident`, which for `auto` is where a GPU has room
    and the augmentation is one gather; raises UserError where they should and can not.
    """
    wanted, others = recipe.data.resident, sorted(set(recipe.augment.operations) - GATHERED)
    if wanted == "off":
        return False
    if wanted == "on":
        if others:
            raise UserError(f"data.resident=on can not {', '.join(others)} (augment): --set data.resident=off.")
        return True
    if others or device.type != "cuda":
        return False
    return bytes_of(cache, cases) <= SHARE * torch.cuda.mem_get_info(device)[0]


def bytes_of(cache: Cache, cases: Sequence[str]) -> int:
    """What the image and label of these cases take."""
    sizes = [cache.array(case, "image").shape for case in cases]
    return sum((2 * channels + 1) * math.prod(size) for channels, *size in sizes)


@dataclass(frozen=True)
class Drawn:
    """The parameters of a batch."""

    draws: tuple[Draw, ...]
    keys: tuple[tuple[int, int], ...]


class ResidentLoader:
    """Endless iterator of `Batch`es of a source's samples. The next batch's parameters are drawn beside the step."""

    def __init__(self, source: VolumeSource, cache: Cache, *, batch: int, device: torch.device, quiet: bool = False):
        self.source, self.batch, self.crop = source, batch, source.crop
        self.place = {case: n for n, case in enumerate(source.cases)}
        if not quiet:
            size = bytes_of(cache, source.cases) / 1e9
            print(f"{len(self.place)} training volumes stay on the {device.type.upper()} ({size:.2f} GB)", flush=True)
        pairs = ([torch.from_numpy(cache.read(case, name)) for name in ("image", "label")] for case in source.cases)
        voxels = sum(math.prod(cache.array(case, "label").shape) for case in source.cases)
        self.volumes = Volumes.pack(((image, label) for image, label in pairs), device, voxels)
        self.layout = rows.layout(self.volumes.channels)
        self._taken = 0
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._ahead = self._beside.submit(self._draw, 0)

    def _draw(self, first: int) -> Drawn:
        keys = tuple(self.source.stream.epoch_and_index(first + n) for n in range(self.batch))
        return Drawn(tuple(self.source.draw(*key) for key in keys), keys)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        drawn = self._ahead.result()
        self._taken += self.batch
        self._ahead = self._beside.submit(self._draw, self._taken)
        row = torch.stack([torch.from_numpy(draw.row) for draw in drawn.draws])
        image, label = augment(
            self.volumes, [self.place[draw.case] for draw in drawn.draws],
            [(draw.start, draw.stop) for draw in drawn.draws], row, self.layout, self.crop,
        )  # fmt: skip
        return Batch(image, label, torch.tensor(drawn.keys))
