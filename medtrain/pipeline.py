"""What DALI's pipelines have in common: sources whose errors name the case, memory that is held as long as a GPU needs
it, processes that are looked after. DALI is imported by the `pipeline.py` of each package only.
"""

import re
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch

from medtrain.errors import Failed, UserError
from medtrain.processes import Watch, signals_wait


def options(batch: int, workers: int, threads: int, device: torch.device | None) -> dict[str, Any]:
    """What every pipeline is built with; `gpu` and `parallel` tell its operators where they run. Raises UserError where
    DALI can not be loaded.
    """
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"NVIDIA DALI can not be loaded ({error}): python -m pip install -c constraints.txt nvidia-dali-cuda130."
        ) from None
    gpu = device is not None and device.type == "cuda"
    return {
        "gpu": gpu, "parallel": workers > 0, "batch_size": batch, "num_threads": threads,
        "device_id": (device.index or 0) if gpu and device is not None else None,
        "py_num_workers": max(1, workers), "py_start_method": "spawn", "prefetch_queue_depth": 2,
    }  # fmt: skip


def _endless(pipe: Any, names: list[str]) -> Any:
    """An iterator over the batches of a pipeline as lists of one dictionary of tensors."""
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    return DALIGenericIterator([pipe], names, size=-1, auto_reset=False, prepare_first_batch=False,
                               last_batch_policy=LastBatchPolicy.PARTIAL)  # fmt: skip


class BatchHolder:
    """Holds batches on a GPU until the device has done with what was asked of it while they were the newest.

    torch reads DALI's own memory, and DALI fills memory again as soon as torch lets go of it: it waits for nothing that
    is still queued on torch's stream, and the host is steps ahead of the device. At most `MOST` are held.
    """

    MOST = 2

    def __init__(self) -> None:
        self._newest: Any = None
        self._older: deque[tuple[Any, Any]] = deque()

    def take(self, batch: Any) -> Any:
        """Hold this batch; let go of older ones that the device has done with."""
        if self._newest is not None:
            done = torch.cuda.Event()
            done.record()
            self._older.append((done, self._newest))
        while self._older and (len(self._older) > self.MOST or self._older[0][0].query()):
            self._older[0][0].synchronize()
            self._older.popleft()
        self._newest = batch
        return batch


class Loader:
    """Iterates over a pipeline's batches; an error of the source names the case, a dead worker ends the wait for it."""

    def __init__(self, pipe: Any, names: list[str], gpu: bool = False):
        with signals_wait():  # it starts the workers
            self._iterator = _endless(pipe, names)
        self._kept = BatchHolder() if gpu else None
        self._watch = Watch(getattr(getattr(pipe._py_pool, "pool", None), "_processes", []))

    def __iter__(self) -> Self:
        return self

    def _next(self) -> Any:
        try:
            with self._watch.waiting():
                (out,) = next(self._iterator)
        except Exception as error:  # DALI raises RuntimeError and plain Exception
            found = TOLD.findall(str(error))
            if found:  # the last one: the text may quote the line below that raises it
                case, words = found[-1]
                if words.startswith("UserError: "):
                    raise UserError(words.removeprefix("UserError: ")) from None
                raise Failed(f"case {case} can not be loaded: {words}") from None
            dead = self._watch.verdict()
            if dead:
                raise Failed(dead) from None
            raise
        return self._kept.take(out) if self._kept else out


# How a worker tells the main process, through the text of DALI's error, which case it was about.
TOLD = re.compile(r"<case (.*?)> (.*?) </case>", re.DOTALL)


class Source(Protocol):
    """What gives DALI its samples: arrays, by DALI's SampleInfo."""

    def __call__(self, info: Any) -> tuple[np.ndarray, ...]: ...

    def case_at(self, number: int) -> str:
        """The case that the sample of this number is of, for messages."""


@dataclass
class Told:
    """A source whose errors name the case."""

    source: Source

    def __call__(self, info: Any) -> tuple[np.ndarray, ...]:
        try:
            return self.source(info)
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"<case {self.source.case_at(info.idx_in_epoch)}> {words} </case>") from None
