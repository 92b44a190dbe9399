"""Cheap counters between two log lines."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from medtrain import distributed
from medtrain.distributed import Ranks
from medtrain.profiling import PARTS


class Meter:
    """Loss, speed, the parts of a step and skipped steps; what lies on the device stays there until it is read."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.note = ""
        self._row = torch.zeros((), device=ranks.device)
        self.skipped_in_row = 0  # steps skipped one after the other up to now, as of the last reading
        self.spent = dict.fromkeys(PARTS, 0.0)  # seconds of the whole run, as of the last reading
        self.restart()

    def restart(self) -> None:
        """Start counting anew; a row of skipped steps goes on."""
        self.losses: list[torch.Tensor] = []
        self.skipped: list[torch.Tensor] = []
        self.samples, self.began = 0, time.monotonic()
        self._times = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time inside for one of `PARTS`: of the device where there is one, without waiting for it."""
        with torch.profiler.record_function(f"step/{part}"):
            if self.ranks.device.type == "cuda" and part != "data":
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                first.record()
                yield
                last.record()
                self._events.append((part, first, last))
                return
            before = time.monotonic()
            yield
            self._times[part] += time.monotonic() - before

    def add(self, loss: torch.Tensor, skipped: torch.Tensor, samples: int) -> None:
        """Count one step; `skipped` is 1 where it was skipped, else 0."""
        self.losses.append(loss)
        self.skipped.append(skipped)
        self._row = (self._row + skipped) * skipped
        self.samples += samples

    def read(self) -> dict[str, float]:
        """Mean loss over ranks, samples a second, shares of the parts of a step, memory; then restart."""
        loss = float(distributed.mean(torch.stack(self.losses).mean()))
        self.skipped_in_row = int(self._row)
        spent = max(1e-9, time.monotonic() - self.began)
        for part, first, last in self._events:  # the reading of the loss has waited for them
            self._times[part] += first.elapsed_time(last) / 1e3
        for part, seconds in self._times.items():
            self.spent[part] += seconds
        values = {
            "train/loss": loss,
            "train/skipped": float(torch.stack(self.skipped).sum()),
            "speed/samples_per_s": self.samples / spent,
            "speed/data_wait_share": self._times["data"] / spent,
            **{f"speed/{part}_share": self._times[part] / spent for part in PARTS[1:]},
            "memory/peak_gb": peak_gb(self.ranks.device),
        }
        self.note = f"loss {loss:.4f}, {values['speed/samples_per_s']:.2f} samples/s"
        self.restart()
        return values


def peak_gb(device: torch.device) -> float:
    """The most memory so far: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # not getrusage's, which begins with the memory of the process that started this one
    words = Path("/proc/self/status").read_text(encoding="utf-8").split()
    return int(words[words.index("VmHWM:") + 1]) * 1024 / 1e9
