"""Tables as text: CSV for programs, Markdown for people."""

import csv
import io
from collections.abc import Iterable, Sequence

from medtrain.wording import printable


def to_csv(lines: Iterable[Sequence[object]]) -> str:
    """Lines as CSV text."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def to_markdown(lines: Sequence[Sequence[object]], foot: Sequence[str] = ()) -> str:
    """Lines as a Markdown table, the first being its head; numbers to the right; notes below."""
    cells = [[printable(str(cell)).replace("|", "\\|") for cell in line] for line in lines]
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
