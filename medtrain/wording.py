"""Words of messages: what a file says is shown in one line, cut where it is long."""

import unicodedata
from collections.abc import Sequence

# Control characters, halves of a character, ends of lines and paragraphs.
UNFIT = {"Cc", "Cs", "Zl", "Zp"}


def plain(name: str) -> bool:
    """Whether a name can stand in a line of a table, a terminal and a file."""
    return name.isprintable() or not any(unicodedata.category(c) in UNFIT for c in name)


def shown(value: object, most: int = 120) -> str:
    """A name or path as it can be printed: without control characters, and the middle of a long one left out."""
    text = str(value)
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[-(most // 2) :]}"
    return printable(text)


def printable(text: str, keep: str = "") -> str:
    """A text from anywhere without control characters, but those to `keep`: a terminal would obey them."""
    return "".join(c if c in keep or plain(c) else c.encode("unicode_escape").decode() for c in text)


def listed(values: Sequence[object], most: int = 5) -> str:
    """Some names with commas between them, and how many more there are."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(shown(value, 40) for value in values[:most]) + more
