"""Results: one row per case and member, kept; means and tables come later and are never edited by hand."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medtrain.errors import UserError
from medtrain.files import read_json, write_text

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


def read_done(path: Path, **kinds: Any) -> dict[str, Any]:
    """Read a run's done.json, whose entries must be of these types; raises UserError."""
    done = read_json(path)
    for name, kind in kinds.items():
        if not isinstance(done.get(name), kind):
            raise UserError(f"{path} is damaged ({name}): remove it, and train that run to its end again.")
    return done


def is_done(run: Path) -> bool:
    """Whether a member has left all that the tables need."""
    return (run / "done.json").is_file() and (run / "cases.csv").is_file()


def why_missing(run: Path) -> str:
    """What a member that is not done says of itself."""
    failed = run / "failed.json"
    return str(read_json(failed).get("reason")) if failed.is_file() else "did not finish"


def check_trained_on(run: Path, cache: Any) -> None:
    """UserError where a run's data were not what a cache holds."""
    if read_json(run / "cache.json").get("fingerprint") != cache.fingerprint:
        raise UserError(f"{run} was trained on other data than {cache.path} holds: train it again elsewhere.")


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


def to_csv(lines: Iterable[Sequence[object]]) -> str:
    """Lines as CSV text."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def to_markdown(lines: Sequence[Sequence[object]], foot: Sequence[str] = ()) -> str:
    """Lines as a Markdown table, the first being its head; numbers to the right; notes below."""
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    right = [all(_is_number(line[i]) for line in cells[1:]) for i in range(len(cells[0]))]

    def show(line: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    text = "\n".join([show(cells[0]), rule, *map(show, cells[1:])]) + "\n"
    return text + "".join(f"\n{note}\n" for note in foot)


def _is_number(text: str) -> bool:
    try:
        float(text.partition(" (")[0])  # an interval may stand behind it
    except ValueError:
        return text in ("", "–")
    return True
