"""Unusable cases, which do not stop the rest: reported on stderr and listed with the reasons in a CSV."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from medtrain.files import write_text
from medtrain.paths import is_formula, spelt
from medtrain.tables import to_csv

MOST_LINES = 20
BEFORE = r"(?<![^\s('\"])"  # a path begins a sentence, or follows a space, a bracket or a quotation mark

Aside = tuple[str, str]  # case and reason


def listing_of(cache: Path) -> Path:
    """Where that is listed which a cache had to do without."""
    return cache.with_name(f"{cache.name}.set_aside.csv")


def report(aside: Sequence[Aside], listing: Path, what: str, head: str = "case", *, root: Path) -> None:
    """Tell what was set aside (`what` names one of it), and write or remove the list of it; `head` is of its column.

    Paths are told as they lie in the data folder `root` (see `within`).
    """
    told = [(case, _cell(" ".join(within(reason, root).split()))) for case, reason in aside]
    for case, reason in told[:MOST_LINES]:
        print(f"set aside: {case}: {reason}", file=sys.stderr)
    if not aside:
        listing.unlink(missing_ok=True)  # of an earlier call
        return
    write_text(listing, to_csv([(head, "reason"), *told]))
    print(f"{len(aside)} {what}{'s' if len(aside) > 1 else ''} set aside, listed in {listing}", file=sys.stderr)


def within(words: str, root: Path) -> str:
    """A sentence with its paths beginning in `root`: folders around a data set may bear a patient's name, which is to
    stand in no list and no log.
    """
    for place in sorted({str(root), str(root.absolute()), os.path.realpath(root)}, key=len, reverse=True):
        if place.strip("./"):  # else there is nothing around it to be told
            words = _without(words, place)
    return words


def _cell(words: str) -> str:
    """Words that no spreadsheet takes for a formula, as it would a path whose first folder is named so."""
    return f"./{words}" if is_formula(words) else words


def _without(words: str, place: str) -> str:
    for text in {place, spelt(Path(place))}:
        words = re.sub(BEFORE + re.escape(f"{text}/"), "", words)
        if "/" in place:  # else it may be any word
            words = re.sub(BEFORE + re.escape(text) + r"(?=[\s:,;)'\"]|$)", "the data folder", words)
    return words
