"""Which of two classes is the positive one, whose recall is the sensitivity."""

import re
from collections.abc import Sequence

from medtrain.errors import UserError
from medtrain.wording import listed, shown

# Words of class folders without the disease; "bnt" is the published set's benign tissue.
ABSENT = {
    "normal", "benign", "bnt", "healthy", "control", "controls", "negative", "neg", "no", "not", "non", "none",
    "without", "absent", "notumor", "nocancer", "nolesion", "uninfected", "free", "frei", "gutartig",
    "gesund", "nevus", "nevi", "naevus", "lgg",
}  # fmt: skip


def choose_positive(classes: Sequence[str], wanted: str = "") -> int | None:
    """The number of the positive class of two; None where there are more.

    `wanted` names it (`data.positive`). Where it is empty and a word of one name alone tells of absence, such as
    "oral_normal" or "NoTumor", it is the other class; else the second. Raises UserError for an unknown name, and for a
    name where there are more than two classes.
    """
    if wanted and wanted not in classes:
        raise UserError(f"--set data.positive={shown(wanted, 60)}: no such class; choose {listed(classes, 40)}.")
    if len(classes) != 2:
        if wanted:
            raise UserError(f"--set data.positive={shown(wanted, 60)}: of {len(classes)} classes none is positive: "
                            "leave it empty.")  # fmt: skip
        return None
    if wanted:
        return list(classes).index(wanted)
    absent = [_tells_absence(name) for name in classes]
    return absent.index(False) if sum(absent) == 1 else 1


def _tells_absence(name: str) -> bool:
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.split(r"[\W_]+", spaced.lower())
    return any(word in ABSENT or (word.startswith("non") and len(word) > 5) for word in words)
