"""Cases that can not be used and do not stop the others: told on stderr, and listed in a file with their reasons."""

import sys
from collections.abc import Sequence
from pathlib import Path

from medtrain.files import write_text
from medtrain.results import to_csv

MOST_LINES = 20

Aside = tuple[str, str]  # case and reason


def listing_of(cache: Path) -> Path:
    """Where the cases are listed that a cache had to do without."""
    return cache.with_name(f"{cache.name}.set_aside.csv")


def report(aside: Sequence[Aside], listing: Path, what: str) -> None:
    """Tell what was set aside (`what` names one of it), and write or remove the list of it."""
    for case, reason in aside[:MOST_LINES]:
        print(f"set aside: {case}: {' '.join(reason.split())}", file=sys.stderr)
    if not aside:
        listing.unlink(missing_ok=True)  # of an earlier call
        return
    write_text(listing, to_csv([("case", "reason"), *((case, " ".join(reason.split())) for case, reason in aside)]))
    print(f"{len(aside)} {what}{'s' if len(aside) > 1 else ''} set aside, listed in {listing}", file=sys.stderr)
