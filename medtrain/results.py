"""Results: one row per case and member, kept; means and tables come later and are never edited by hand."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medtrain.errors import UserError
from medtrain.files import write_text
from medtrain.tables import to_csv

HEAD = ["member", "case", "part"]
RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class CaseRow:
    """The scores of one member on one case, with the part of the split that the case belongs to."""

    member: str
    case: str
    part: str
    scores: Mapping[str, float]


def write_rows(path: Path, rows: Sequence[CaseRow]) -> None:
    """Write rows as CSV, atomically; a score that a row has not is an empty cell."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    lines = [[*HEAD, *names]]
    lines += [[r.member, r.case, r.part, *(_number(r.scores.get(name)) for name in names)] for r in rows]
    write_text(path, to_csv(lines))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.9g}"


def read_rows(path: Path, needs: Sequence[str] = ()) -> list[CaseRow]:
    """Read `write_rows`'s file back. Raises UserError where it is absent or of another form, lacks a score that `needs`
    names, tells of a case twice, tells more of one case of a member than of another, or holds what is no number.
    """
    try:
        lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
        names = lines[0][3:]
        rows = [
            CaseRow(member=m, case=c, part=p, scores={n: float(v) for n, v in zip(names, values, strict=True) if v})
            for m, c, p, *values in lines[1:]
        ]
        if lines[0][:3] != HEAD or len(set(names)) < len(names) or not all(set(needs) <= set(r.scores) for r in rows):
            raise ValueError
        if len({(row.member, row.case, row.part) for row in rows}) < len(rows):
            raise ValueError
        if len({(row.member, *row.scores) for row in rows}) > len({row.member for row in rows}):
            raise ValueError
        if not all(math.isfinite(value) for row in rows for value in row.scores.values()):
            raise ValueError
        return rows
    except (OSError, IndexError, ValueError, csv.Error):
        raise UserError(f"{path} is absent or not a table of case rows: train or finish the run again.") from None


def means(rows: Iterable[CaseRow]) -> dict[str, float]:
    """The mean of each score over rows, of those scores that every row has; empty for no rows."""
    taken = list(rows)
    names = [name for name in taken[0].scores if all(name in row.scores for row in taken)] if taken else []
    return {name: math.fsum(row.scores[name] for row in taken) / len(taken) for name in names}


def intervals(rows: Sequence[CaseRow], names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """95 % intervals (low, high) of the means of some scores over cases: the 2.5th and 97.5th percentile of the means
    of 1000 draws of as many cases with replacement (the percentile bootstrap, Efron 1979, by scipy).

    The draws have a fixed seed and know the cases by their order of names: the same rows give the same intervals, and
    members that were judged on the same cases share the draws. Empty for fewer than two rows.
    """
    from scipy.stats import bootstrap

    if len(rows) < 2:
        return {}
    values_NS = np.array([[row.scores[name] for name in names] for row in sorted(rows, key=lambda row: row.case)])
    found = bootstrap((values_NS,), np.mean, axis=0, n_resamples=RESAMPLES, confidence_level=0.95,
                      method="percentile", rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
    return {name: (float(a), float(b)) for name, a, b in zip(names, found.low, found.high, strict=True)}
