"""Overlays show what they are given, in the colours of the legend."""

from pathlib import Path

import numpy as np
from matplotlib.image import imread

from medseg.figures import COLOURS, overlay, write_box_plot, write_overlay
from medseg.labels import KNOWN
from medtrain.results import CaseRow


def test_overlay_shows_the_slice_with_the_most_tumour() -> None:
    scan = np.zeros((20, 30, 10), np.float32)
    scan[2:18, 4:26, :] = 1 + np.random.default_rng(0).random((16, 22, 10))
    reference = np.zeros(scan.shape, np.uint8)
    reference[5:9, 10:14, 7] = 3
    picture = overlay(scan, reference, np.zeros_like(reference), KNOWN["msd"])
    plain, true, predicted = np.split(picture, 3, axis=1)
    assert np.array_equal(plain, predicted)
    changed = (plain != true).any(axis=2)
    assert changed.sum() == 16
    rows, columns = np.nonzero(changed)
    # front up: H 13 of the frame's 1..28 comes above; the patient's right (large D) on the left
    assert rows.min() == 28 - 13
    assert columns.min() == 20 - 1 - 8
    reds = true[changed].astype(int)
    assert (reds[:, 0] > reds[:, 2]).all()
    assert COLOURS["enhancing"][0] > COLOURS["enhancing"][2]


def test_overlay_without_tumour_or_brain() -> None:
    empty = np.zeros((8, 9, 10), np.uint8)
    assert overlay(empty.astype(np.float32), empty, empty, KNOWN["msd"]).shape == (9, 24, 3)


def test_pictures_are_written(tmp_path: Path) -> None:
    rows = [
        CaseRow(member=m, case=c, part="val", scores={"mean": v, "TC": v, "WT": v, "ET": v})
        for m, c, v in [("a", "1", 0.2), ("a", "2", 0.4), ("b", "1", 0.9), ("b", "2", 0.8)]
    ]
    write_box_plot(tmp_path / "box.png", rows)
    write_overlay(tmp_path / "overlay.png", np.zeros((9, 24, 3), np.uint8), "title")
    assert imread(tmp_path / "box.png").shape[2] in (3, 4)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["box.png", "overlay.png"]
