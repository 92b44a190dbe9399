"""What is done case by case, so that work of hours that was cut off goes on where it was."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medtrain.checkpoint import BEST
from medtrain.files import file_stamp

Scores = Mapping[str, Mapping[str, float]]  # of every judged member


class Kept:
    """An append-only file of cases that are done, with their scores if there are any, one JSON line each.

    A case counts as done only if `about` (JSON-able: which weights, which settings) and the stamp of its files hash as
    they did when it was noted. A line that was not written to its end, or whose scores are no numbers, is passed over.
    """

    def __init__(self, path: Path, about: Any):
        self.path, self.about = path, about
        self._found: dict[tuple[str, str], Scores] = {}
        if path.is_file():
            for line in path.read_bytes().splitlines():
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            told = json.loads(line)
            scores = {str(member): {str(name): float(value) for name, value in of.items()}
                      for member, of in told["scores"].items()}  # fmt: skip
            self._found[str(told["case"]), str(told["key"])] = scores
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
            return

    def _key(self, stamp: Any) -> str:
        return digest([self.about, stamp])

    def get(self, case: str, stamp: Any = None) -> Scores | None:
        """What was noted of a case whose files are as `stamp` says, or None."""
        return self._found.get((case, self._key(stamp)))

    def add(self, case: str, scores: Scores, stamp: Any = None) -> None:
        """Note a case; the line is on the disk when this returns."""
        key = self._key(stamp)
        with open(self.path, "a", encoding="utf-8") as file:
            # a line of its own, also after one that was cut off
            file.write("\n" + json.dumps({"key": key, "case": case, "scores": scores}) + "\n")
        self._found[case, key] = scores


def digest(value: Any) -> str:
    """Sixteen characters that tell JSON-able values apart."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def weights_of(runs: Sequence[Path]) -> list[list[Any]]:
    """Which runs, and which of their weights."""
    return [[run.name, *file_stamp(run / BEST)] for run in runs]
