"""Pictures of results: confusion matrices, and bars of accuracy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medtrain.files import replacing

MEMBER, ENSEMBLE, BASELINE, PUBLISHED = "#56b4e9", "#009e73", "#999999", "#e69f00"


def _confusion(counts_KK: np.ndarray, classes: Sequence[str], title: str) -> Any:
    from matplotlib.figure import Figure

    count = len(classes)
    side = max(3.6, 0.5 * count + 2.2)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.add_subplot()
    shares = counts_KK / np.maximum(1, counts_KK.sum(1, keepdims=True))
    shown = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i in range(count):
        for j in range(count):
            if counts_KK[i, j] or count <= 8:
                dark = shares[i, j] > 0.55
                axis.text(j, i, str(counts_KK[i, j]), ha="center", va="center", color="white" if dark else "black",
                          fontsize=10 if count <= 8 else 6)  # fmt: skip
    tilt: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(count), classes, **tilt)
    axis.set_yticks(range(count), classes)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if title:
        axis.set_title(title, fontsize=10)
    figure.colorbar(shown, ax=axis, label="share of the true class", shrink=0.8)
    return figure


def confusion_picture(counts_KK: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """A confusion matrix as (H,W,3) uint8, for TensorBoard."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(_confusion(counts_KK, classes, ""))
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def write_confusion(path: Path, counts_KK: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Write a confusion matrix as PNG."""
    with replacing(path) as temporary:
        _confusion(counts_KK, classes, title).savefig(temporary, dpi=130, format="png")


def write_bars(path: Path, bars: Sequence[tuple[str, float, str]], title: str) -> None:
    """Write accuracies as horizontal bars; each is (name, accuracy, colour)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.42 * len(bars) + 1.3), layout="constrained")
    axis = figure.add_subplot()
    places = np.arange(len(bars))[::-1]
    axis.barh(places, [value for _, value, _ in bars], color=[colour for _, _, colour in bars], height=0.7)
    for place, (_, value, _) in zip(places, bars, strict=True):
        axis.text(value + 0.008, place, f"{value:.3f}", va="center", fontsize=9)
    axis.set_yticks(places, [name for name, _, _ in bars])
    axis.set_xlim(0, 1.1)
    axis.set_xlabel("accuracy on the test images")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.set_title(title, fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
