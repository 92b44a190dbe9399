"""Pictures of results: overlays on a slice, and the box plot of per-case Dice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg.labels import REGIONS, LabelMap
from medtrain.files import replacing
from medtrain.results import CaseRow

MARGIN = 3  # pixels around the brain
# Oedema, core, enhancing: told apart with the common colour deficiencies too (Okabe and Ito).
COLOURS = {"edema": (86, 180, 233), "core": (230, 159, 0), "enhancing": (204, 60, 60)}


def overlay(
    background_DHW: np.ndarray, reference_DHW: np.ndarray, prediction_DHW: np.ndarray, label_map: LabelMap
) -> np.ndarray:
    """Scan, scan with the true label, scan with the predicted label, side by side on the axial slice with the most
    tumour; (H, 3 W, 3) uint8, front up and the patient's right on the left.
    """
    tumour = (reference_DHW > 0).sum(axis=(0, 1))
    level = int(tumour.argmax()) if tumour.any() else reference_DHW.shape[2] // 2
    plane = background_DHW[:, :, level]
    brain = plane != 0
    low, high = np.percentile(background_DHW[background_DHW != 0], (1, 99.5)) if background_DHW.any() else (0, 1)
    grey = (np.where(brain, np.clip((plane - low) / max(1e-6, high - low), 0.08, 1), 0) * 255).astype(np.uint8)
    panels = [np.repeat(grey[..., None], 3, 2)]
    for label in (reference_DHW, prediction_DHW):
        panels.append(_coloured(panels[0], label[:, :, level], label_map))
    # canonical axes go to the right and to the front; a picture's rows go down
    box = _frame(brain)
    turned = [np.flip(np.flip(panel[box], 0).swapaxes(0, 1), 0) for panel in panels]
    return np.ascontiguousarray(np.concatenate(turned, axis=1))


def _frame(mask: np.ndarray) -> tuple[slice, slice]:
    """The box of a mask and a margin, so that pictures show little empty ground."""
    frame = []
    for axis in (1, 0):
        line = np.flatnonzero(mask.any(axis=axis))
        first, last = (int(line[0]), int(line[-1])) if line.size else (0, mask.shape[1 - axis] - 1)
        frame.append(slice(max(0, first - MARGIN), last + 1 + MARGIN))
    return frame[0], frame[1]


def _coloured(grey: np.ndarray, label: np.ndarray, label_map: LabelMap) -> np.ndarray:
    out = grey.astype(np.float32)
    for role, colour in COLOURS.items():
        where = label == getattr(label_map, role)
        out[where] = 0.45 * out[where] + 0.55 * np.array(colour, np.float32)
    return out.astype(np.uint8)


def write_overlay(path: Path, picture_HWC: np.ndarray, title: str) -> None:
    """Write an overlay as PNG with captions and a legend."""
    figure, axis = _figure((9, 4.4))
    axis.imshow(picture_HWC, interpolation="nearest")
    axis.set_axis_off()
    width = picture_HWC.shape[1] / 3
    for panel, caption in enumerate(("FLAIR", "reference", "prediction")):
        axis.text((panel + 0.5) * width, -4, caption, ha="center", va="bottom")
    from matplotlib.patches import Patch

    names = {"edema": "oedema", "core": "non-enhancing core", "enhancing": "enhancing tumour"}
    handles = [Patch(color=(r / 255, g / 255, b / 255), label=names[role]) for role, (r, g, b) in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    _write(figure, path)


def write_box_plot(path: Path, rows: Sequence[CaseRow]) -> None:
    """Box plot of per-case Dice: one group a region, one box a member, the cases as dots."""
    members = list(dict.fromkeys(row.member for row in rows))
    names = ("mean", *REGIONS)
    figure, axis = _figure((8, 4.5))
    colours = [np.array(c) / 255 for c in ((86, 180, 233), (230, 159, 0), (0, 158, 115), (204, 121, 167))]
    width = 0.8 / len(members)
    for m, member in enumerate(members):
        values = [[row.scores[name] for row in rows if row.member == member] for name in names]
        places = np.arange(len(names)) + (m - (len(members) - 1) / 2) * width
        boxes = axis.boxplot(values, positions=places, widths=0.85 * width, patch_artist=True, showfliers=False,
                             medianprops={"color": "black"})  # fmt: skip
        for box in boxes["boxes"]:
            box.set(facecolor=colours[m % len(colours)], alpha=0.6)
        boxes["boxes"][0].set_label(member)
        for place, dots in zip(places, values, strict=True):
            axis.plot(np.full(len(dots), place), dots, ".", color="black", markersize=3, alpha=0.7)
    axis.set_xticks(range(len(names)), ["mean of regions", *REGIONS])
    axis.set_ylim(-0.02, 1.02)
    axis.set_ylabel("Dice per case")
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    count = len({row.case for row in rows})
    axis.set_title(f"Dice on the original spacing, {count} held-out case{'s' if count != 1 else ''}")
    _write(figure, path)


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _write(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
