"""Progress of long work with an estimate of the end: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self

from tqdm import tqdm


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 05 s or 2 h 10 min."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Counts `total` things; `quiet` shows nothing (ranks other than 0)."""

    def __init__(self, total: int, what: str, *, start: int = 0, quiet: bool = False, every_s: float = 15.0):
        self.total, self.what, self.done, self.first, self.quiet = total, what, start, start, quiet
        self.every_s, self.began = every_s, time.monotonic()
        self.said = self.began
        self.bar: Any = None
        if not quiet and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=start, desc=what, dynamic_ncols=True, smoothing=0.05)

    def advance(self, note: str = "", count: int = 1) -> None:
        """Say that `count` more are done."""
        self.done += count
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.update(count)
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            return
        now = time.monotonic()
        if now - self.said >= self.every_s or self.done == self.total:
            self.said = now
            spent = now - self.began
            left = spent / max(1, self.done - self.first) * (self.total - self.done)
            ending = f"took {duration(spent)}" if self.done >= self.total else f"{duration(left)} left"
            print(f"{self.what}: {self.done}/{self.total}, {ending}{', ' + note if note else ''}", flush=True)

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def track(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
    """Yield the items, counted."""
    with Progress(total, what) as progress:
        for item in items:
            yield item
            progress.advance()
