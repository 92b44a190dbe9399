"""Label codes and regions: what a data set's numbers mean, said by name and never guessed twice."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

REGIONS = ("TC", "WT", "ET")


@dataclass(frozen=True)
class LabelMap:
    """The codes of oedema, non-enhancing (and necrotic) core, and enhancing tumour.

    Regions: TC (tumour core) = non-enhancing or enhancing; WT (whole tumour) = any; ET = enhancing.
    """

    name: str
    edema: int
    core: int
    enhancing: int

    def codes(self, region: str) -> tuple[int, ...]:
        """The label codes that make up a region."""
        return {
            "TC": (self.core, self.enhancing),
            "WT": (self.edema, self.core, self.enhancing),
            "ET": (self.enhancing,),
        }[region]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values, for caches, checkpoints and tables."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Read `to_dict`'s value back; raises KeyError, TypeError or ValueError where it is none."""
        codes = [int(value[role]) for role in ("edema", "core", "enhancing")]
        if len(set(codes)) != 3 or not all(1 <= code <= 255 for code in codes):
            raise ValueError(f"codes {codes}")
        return cls(str(value["name"]), *codes)

    def regions(self, label: np.ndarray) -> np.ndarray:
        """Region masks (3, *shape) bool in the order of REGIONS from raw codes (*shape)."""
        return np.stack([np.isin(label, self.codes(region)) for region in REGIONS])

    def recode(self, label: np.ndarray, other: "LabelMap") -> np.ndarray:
        """The same tissues in the codes of another map: uint8 of any shape, 0 stays 0."""
        codes = np.zeros(256, np.uint8)
        for role in ("edema", "core", "enhancing"):
            codes[getattr(self, role)] = getattr(other, role)
        return codes[label]

    def label(self, probs_KDHW: np.ndarray, threshold: float = 0.5) -> np.ndarray:
        """Raw codes (D,H,W) uint8 from region probabilities: ET wins over TC, TC over WT, so regions nest."""
        tc, wt, et = (probs_KDHW[k] >= threshold for k in range(3))
        label = np.zeros(probs_KDHW.shape[1:], np.uint8)
        label[wt] = self.edema
        label[tc] = self.core
        label[et] = self.enhancing
        return label


# `legacy` is the reading of a widely copied tutorial, which takes MSD's code 2 for enhancing tumour.
KNOWN = {
    "msd": LabelMap("msd", edema=1, core=2, enhancing=3),
    "legacy": LabelMap("legacy", edema=1, core=3, enhancing=2),
    "brats18": LabelMap("brats18", edema=2, core=1, enhancing=4),
    "brats23": LabelMap("brats23", edema=2, core=1, enhancing=3),
}


def from_names(names: Mapping[str, str]) -> LabelMap | None:
    """Read a label map from a dataset.json's `labels` ({"1": "edema", ...}); None where the words do not tell."""
    found: dict[str, int] = {}
    for code, words in names.items():
        if not (code.isdecimal() and len(code) < 10):
            return None
        text = str(words).lower()
        if "edema" in text or "ed" in text.split():
            found["edema"] = int(code)
        elif ("non" in text and "enhanc" in text) or "necro" in text or "ncr" in text:
            found["core"] = int(code)
        elif "enhanc" in text or text in ("et", "at"):
            found["enhancing"] = int(code)
    if len(found) != 3:
        return None
    return from_codes(**found)


def from_codes(edema: int, core: int, enhancing: int) -> LabelMap | None:
    """The label map of three codes, by its name where it is known; None where they can be none."""
    codes = (edema, core, enhancing)
    if len(set(codes)) != 3 or not all(1 <= code <= 255 for code in codes):
        return None  # labels are stored as bytes, and 0 is what is no tumour
    for known in KNOWN.values():
        if (known.edema, known.core, known.enhancing) == codes:
            return known
    return LabelMap("dataset", *codes)
