"""What the scans of a prepared cache have in common, and what is odd about them: told when they are prepared."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medseg.cache import Cache
from medseg.preparation import beyond, in_words

# A brain fills half of its box (0.50 to 0.54 in eight BraTS scans), a head with its skull, or noise, all of it.
WHOLE_BOX = 0.9
NO_BRAIN = (
    f"has signal in more than {WHOLE_BOX:.0%} of its box, as a head with its skull, noise in the air, or air that "
    "is not 0: intensities are normalised over all of it, so take the skull off first (HD-BET, say), or set air to 0"
)


def report_scans(path: Path) -> None:
    """Everything that is odd about a cache's scans."""
    cache = Cache(path)
    for report in (report_tissues, report_enhancement, report_spacing, report_heads, report_orientation):
        report(cache)
    cache.close()


def voxel_sizes(cache: Cache) -> np.ndarray:
    """The scans' own voxel sizes (N,3), in mm along D, H, W, of the cases that tell them."""
    told = [cache.facts(case).get("voxel_mm") for case in cache.ids]
    return np.array([mm for mm in told if _is_size(mm)], float).reshape(-1, 3)


def _is_size(mm: Any) -> bool:
    return isinstance(mm, list) and len(mm) == 3 and all(isinstance(n, float) and 1e-3 <= n <= 1e3 for n in mm)


def scans_voxels(cache: Cache) -> dict[str, list[float]]:
    """Median, least and largest voxel size (D, H, W) of a cache that keeps the scans' own, by the names of
    `Preparation`; nothing for one that is resampled.
    """
    sizes = voxel_sizes(cache)
    if cache.spacing_mm or not len(sizes):
        return {}
    found = {"voxel_mm": np.median(sizes, 0), "least_mm": sizes.min(0), "most_mm": sizes.max(0)}
    return {name: [round(float(n), 4) for n in mm] for name, mm in found.items()}


def report_spacing(cache: Cache) -> bool:
    """Tell of scans that are kept at clearly different voxel sizes; returns whether there are some."""
    sizes, kept = voxel_sizes(cache), not cache.spacing_mm
    if not kept or not len(sizes) or not any(map(beyond, sizes.max(0), sizes.min(0), sizes.min(0))):
        return False
    one = f"{np.median(sizes):.2g}"
    print(
        f"note: voxels range from {in_words(sizes.min(0))} to {in_words(sizes.max(0))} and are kept as they are: "
        f"--spacing-mm {one} makes them alike (train with data.spacing_mm={one}).",
        flush=True,
    )
    return True


def report_tissues(cache: Cache) -> list[str]:
    """Warn on stderr of the tissues of the label map that no case has; returns them."""
    codes = {role: cache.labels[role] for role in ("edema", "core", "enhancing")}
    lacking = [role for role, code in codes.items()
               if not any(len(cache.read(case, f"voxels_{code}")) for case in cache.ids)]  # fmt: skip
    name = cache.labels["name"]
    if lacking:
        told = ", ".join(f"{role} (code {codes[role]})" for role in lacking)
        print(f"WARNING: under label map {name} no case has {told}: is it right (--label-map)?", file=sys.stderr)
    return lacking


def report_enhancement(cache: Cache) -> list[str]:
    """Warn on stderr of the cases whose enhancing tumour is darker on T1Gd than their core; returns their ids."""
    contrast = {case: cache.facts(case)["t1gd_contrast"] for case in cache.ids}
    told = {case: value for case, value in contrast.items() if value is not None}
    odd = sorted(case for case, value in told.items() if value <= 0)
    name = cache.labels["name"]
    if not odd:
        return odd
    shown = ", ".join(odd[:8]) + (f" and {len(odd) - 8} more" if len(odd) > 8 else "")
    wrong = len(odd) > len(told) / 2
    advice = "the label map is probably wrong (--label-map)" if wrong else "look at them"
    print(
        f"WARNING: under label map {name}, enhancing tumour is darker on T1Gd than the non-enhancing core in "
        f"{len(odd)} of {len(told)} cases, {advice}: {shown}.",
        file=sys.stderr,
    )
    return odd


def is_whole_head(facts: Mapping[str, Any]) -> bool:
    """Whether a case's signal fills its box, as no brain does."""
    share = facts.get("brain_share")
    return isinstance(share, float) and share > WHOLE_BOX


def report_heads(cache: Cache) -> list[str]:
    """Warn on stderr of scans that seem to hold more than a brain; returns their ids."""
    odd = [case for case in cache.ids if is_whole_head(cache.facts(case))]
    count = len(cache.ids)
    if odd:
        print(f"WARNING: {len(odd)} of {count} cases, such as {odd[0]}: each {NO_BRAIN}.", file=sys.stderr)
    return odd


def report_orientation(cache: Cache) -> list[str]:
    """Warn on stderr of scans whose headers state no orientation; returns their ids."""
    headers = {case: bytes.fromhex(cache.facts(case)["grid"]["header"]) for case in cache.ids}
    bare = [case for case, header in headers.items() if not _states_place(header)]
    if bare:
        print(f"WARNING: {len(bare)} of {len(headers)} cases, such as {bare[0]}: no orientation is stated (codes of "
              "qform and sform are 0); axes are taken to run to the left, front and top: see that left is left.",
              file=sys.stderr)  # fmt: skip
    return bare


def _states_place(header: bytes) -> bool:
    found = nib.Nifti1Header(header, check=False)
    return bool(found["qform_code"] > 0 or found["sform_code"] > 0)
