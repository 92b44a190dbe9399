"""Writes checkpoints beside training: a copy is taken at once, a thread brings it to the disk."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from medtrain import checkpoint

# Copies in memory at most: the best weights and the newest state, which follow each other.
PENDING = 2


class Writer:
    """Brings checkpoints to the disk in the order in which they are given; training waits only for the copy.

    An error of the thread (a full disk) comes out of the next `write` or of `wait`.
    """

    def __init__(self) -> None:
        # its thread is no daemon: a program that ends waits for the file to be whole
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: deque[Future[None]] = deque()

    def write(self, path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
        """Copy `content` to the host and have it written (see `checkpoint.save`); waits while two are under way."""
        while self._under_way and (self._under_way[0].done() or len(self._under_way) >= PENDING):
            self._under_way.popleft().result()
        self._under_way.append(self._pool.submit(checkpoint.save, path, on_host(content), previous))

    def wait(self) -> None:
        """Until everything is on the disk; raises what went wrong there."""
        while self._under_way:
            self._under_way.popleft().result()


def on_host(value: Any) -> Any:
    """A copy of tensors in dictionaries, lists and tuples that training can not change any more, on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_host(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_host(inner) for inner in value)
    return value
