"""Which sample comes at which step, and its random numbers: pure functions of (seed, epoch, index), no state."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Stream:
    """The samples of one rank, in order, for any number of ranks and from any step.

    An epoch has `length` samples. Global positions run on over epochs without a gap: step s holds positions
    [s * batch, (s + 1) * batch), so every sample of an epoch comes once, on one rank, and no batch is short.
    """

    seed: int
    length: int
    batch: int
    accumulate: int = 1
    world: int = 1
    rank: int = 0
    first_step: int = 0

    @property
    def micro_batch(self) -> int:
        """Samples that this rank takes through the network at once."""
        return self.batch // (self.accumulate * self.world)

    def position(self, n: int) -> int:
        """Global position of this rank's n-th sample, counted from the first sample of `first_step`."""
        micro, within = divmod(n, self.micro_batch)
        return self.first_step * self.batch + (micro * self.world + self.rank) * self.micro_batch + within

    def epoch_and_index(self, n: int) -> tuple[int, int]:
        """(epoch, index in the epoch) of this rank's n-th sample."""
        return divmod(self.position(n), self.length)

    def sample(self, epoch: int, index: int) -> int:
        """Which of `length` samples comes at a place of an epoch."""
        return int(permutation(self.seed, epoch, self.length)[index])


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The epoch's permutation of 0..length-1."""
    return np.random.default_rng((seed, epoch)).permutation(length)


def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one sample. The trailing 1 keeps them apart from `permutation`'s."""
    return np.random.default_rng((seed, epoch, index, 1))
