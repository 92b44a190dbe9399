"""Unusable cases, which do not stop the rest: reported on stderr and listed with the reasons in a CSV."""

import sys
from collections.abc import Sequence
from pathlib import Path

from medtrain.files import write_text
from medtrain.tables import to_csv

MOST_LINES = 20

Aside = tuple[str, str]  # case and reason


def listing_of(cache: Path) -> Path:
    """Where that is listed which a cache had to do without."""
    return cache.with_name(f"{cache.name}.set_aside.csv")


def report(aside: Sequence[Aside], listing: Path, what: str, head: str = "case") -> None:
    """Tell what was set aside (`what` names one of it), and write or remove the list of it; `head` is of its column."""
    for case, reason in aside[:MOST_LINES]:
        print(f"set aside: {case}: {' '.join(reason.split())}", file=sys.stderr)
    if not aside:
        listing.unlink(missing_ok=True)  # of an earlier call
        return
    write_text(listing, to_csv([(head, "reason"), *((case, " ".join(reason.split())) for case, reason in aside)]))
    print(f"{len(aside)} {what}{'s' if len(aside) > 1 else ''} set aside, listed in {listing}", file=sys.stderr)
