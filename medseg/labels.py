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

    def in_words(self) -> str:
        """The codes as a person reads them."""
        return f"{self.edema} oedema, {self.core} core, {self.enhancing} enhancing; {self.name}"

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

    def in_files(self) -> "LabelMap":
        """The data set's own codes, where they were recoded as its labels were read."""
        return IN_FILES.get(self.name, self)

    def label(self, probs_KDHW: np.ndarray) -> np.ndarray:
        """Raw codes (D,H,W) uint8 from region probabilities: ET wins over TC, TC over WT, so regions nest."""
        tc, wt, et = (probs_KDHW[k] >= 0.5 for k in range(3))
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
    "brats24": LabelMap("brats24", edema=2, core=1, enhancing=3),
    "brats24ped": LabelMap("brats24ped", edema=2, core=1, enhancing=3),
}
# Codings of more tissues: what each code of a file becomes. BraTS 2024 after an operation has its cavity as 4, which is
# no tumour; of children 1 is enhancing, 2 non-enhancing, 3 cyst (of the core), 4 oedema.
RECODED = {"brats24": {1: 1, 2: 2, 3: 3, 4: 0}, "brats24ped": {1: 3, 2: 1, 3: 1, 4: 2}}
# The way back; a cyst is predicted as the core that it is part of.
IN_FILES = {"brats24ped": LabelMap("brats24ped", edema=4, core=2, enhancing=1)}


def from_names(names: Mapping[str, str]) -> LabelMap | None:
    """Read a label map from a dataset.json's `labels` ({"1": "edema", ...}); None where the words do not tell."""
    found: dict[str, int] = {}
    if not all(code.isdecimal() for code in names) and all(str(code).isdecimal() for code in names.values()):
        names = {str(code): words for words, code in names.items()}  # {"edema": 1, ...}, as nnU-Net writes them
    for code, words in names.items():
        if not (code.isdecimal() and len(code) < 10):
            return None
        role = _role(str(words).lower())
        if role and found.setdefault(role, int(code)) != int(code):
            return None  # two codes of one tissue
    if len(found) != 3:
        return None
    return from_codes(**found)


def _role(words: str) -> str:
    """Which tissue a label's words mean; "" for none. NETC and SNFH are BraTS 2023's words."""
    if "edema" in words or "ed" in words.split() or "snfh" in words:
        return "edema"
    if ("non" in words and "enhanc" in words) or "necro" in words or "ncr" in words or "netc" in words:
        return "core"
    return "enhancing" if "enhanc" in words or words in ("et", "at") else ""


def from_codes(edema: int, core: int, enhancing: int) -> LabelMap | None:
    """The label map of three codes, by its name where it is known; None where they are invalid."""
    codes = (edema, core, enhancing)
    if len(set(codes)) != 3 or not all(1 <= code <= 255 for code in codes):
        return None  # labels are stored as bytes, and 0 is what is no tumour
    for known in KNOWN.values():
        if (known.edema, known.core, known.enhancing) == codes:
            return known
    return LabelMap("dataset", *codes)
