"""Cheap counters between two log lines."""

import contextlib
import resource
import time
from collections.abc import Iterator

import torch

from medtrain import distributed
from medtrain.distributed import Ranks


class Meter:
    """Loss, speed, waiting and skipped steps; what lies on the device stays there until it is read."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.note = ""
        self._row = torch.zeros((), device=ranks.device)
        self.row = 0  # steps skipped one after the other up to now, as of the last reading
        self.restart()

    def restart(self) -> None:
        """Start counting anew; a row of skipped steps goes on."""
        self.losses: list[torch.Tensor] = []
        self.lost: list[torch.Tensor] = []
        self.samples, self.waited_s, self.began = 0, 0.0, time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        before = time.monotonic()
        yield
        self.waited_s += time.monotonic() - before

    def add(self, loss: torch.Tensor, lost: torch.Tensor, samples: int) -> None:
        """Count one step; `lost` is 1 where it was skipped, else 0."""
        self.losses.append(loss)
        self.lost.append(lost)
        self._row = (self._row + lost) * lost
        self.samples += samples

    def read(self) -> dict[str, float]:
        """Mean loss over ranks, samples a second, share of time waiting for data, memory; then restart."""
        loss = float(distributed.mean(torch.stack(self.losses).mean()))
        self.row = int(self._row)
        spent = max(1e-9, time.monotonic() - self.began)
        values = {
            "train/loss": loss,
            "train/skipped": float(torch.stack(self.lost).sum()),
            "speed/samples_per_s": self.samples / spent,
            "speed/data_wait_share": self.waited_s / spent,
            "memory/peak_gb": peak_gb(self.ranks.device),
        }
        self.note = f"loss {loss:.4f}, {values['speed/samples_per_s']:.2f} samples/s"
        self.restart()
        return values


def peak_gb(device: torch.device) -> float:
    """The most memory so far: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
