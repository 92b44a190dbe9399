"""An ensemble's scores case by case, so that a final job that was cut off goes on where it was."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from medtrain.checkpoint import BEST

NAME = "ensemble.jsonl"


class KeptScores:
    """The lines of `ensemble.jsonl` in a sweep folder that are of these runs, weights and cache; others are left alone.

    A line that was not written to its end, or whose scores are no numbers, counts as not there.
    """

    def __init__(self, sweep: Path, runs: Sequence[Path], weights: Sequence[float], fingerprint: str):
        self.path = sweep / NAME
        about = [[run.name, _written(run / BEST), weight] for run, weight in zip(runs, weights, strict=True)]
        text = json.dumps([about, fingerprint])
        self.key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        self.scores: dict[str, dict[str, float]] = {}
        if self.path.is_file():
            for line in self.path.read_bytes().splitlines():
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            told = json.loads(line)
            if told["key"] == self.key:
                self.scores[str(told["case"])] = {str(name): float(value) for name, value in told["scores"].items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return

    def add(self, case: str, scores: dict[str, float]) -> None:
        """Note a case; the line is on the disk when this returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            # a line of its own, also after one that was cut off
            file.write("\n" + json.dumps({"key": self.key, "case": case, "scores": scores}) + "\n")
        self.scores[case] = scores


def _written(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns
