"""Published scores, shown beside ours only where the split is of the same kind."""

import csv
from dataclasses import dataclass
from pathlib import Path

from medcls.recipes import ALL_CANCERS
from medtrain.errors import UserError


@dataclass(frozen=True)
class Published:
    """One published accuracy; `cancer` "every" is the classifier of all classes."""

    cancer: str
    member: str
    split: str
    accuracy: float
    source: str


# From the abstract, which tells of no grouping of copies: taken for a random split.
KNOWN = (Published(ALL_CANCERS, "Xception (2025)", "random", 0.9985, "doi:10.3390/diagnostics15233066"),)


def read_published(path: Path) -> list[Published]:
    """KNOWN and what the file adds (columns cancer, member, split, accuracy, source), if it is there."""
    if not path.is_file():
        return list(KNOWN)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            added = [Published(row["cancer"], row["member"], row["split"], float(row["accuracy"]), row["source"])
                     for row in csv.DictReader(file)]  # fmt: skip
        if not all(0 <= one.accuracy <= 1 for one in added):
            raise ValueError
    except (KeyError, ValueError, TypeError, OSError, csv.Error):
        raise UserError(f"{path} needs the columns cancer, member, split, accuracy (0 to 1), source.") from None
    return [*KNOWN, *added]
