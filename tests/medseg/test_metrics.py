"""Our Dice equals MONAI's on the same arrays and SimpleITK's on the written files; empty masks are said out loud."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from monai.metrics import DiceMetric

from medseg.labels import KNOWN, REGIONS
from medseg.metrics import dice, score_case


def blobs(seed: int, shape: tuple[int, ...] = (11, 12, 13)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)


def test_equals_monai() -> None:
    msd = KNOWN["msd"]
    metric = DiceMetric(reduction="none")
    for seed in range(4):
        prediction, reference = blobs(seed), blobs(seed + 9)
        ours = score_case(prediction, reference, msd)
        p, r = (torch.from_numpy(msd.regions(x)[None]).float() for x in (prediction, reference))
        monais = metric(p, r)[0]
        assert [ours[region] for region in REGIONS] == pytest.approx(monais.tolist(), abs=1e-6)
        assert ours["mean"] == pytest.approx(monais.mean().item(), abs=1e-6)


def test_equals_simpleitk_on_written_files(tmp_path: Path) -> None:
    msd = KNOWN["msd"]
    masks = {}
    for name, label in {"p": blobs(1), "r": blobs(2)}.items():
        nib.Nifti1Image(label, np.diag([2, 1, 1, 1])).to_filename(tmp_path / f"{name}.nii.gz")
        masks[name] = SimpleITK.ReadImage(str(tmp_path / f"{name}.nii.gz"))
    ours = score_case(blobs(1), blobs(2), msd)
    for region in REGIONS:
        pair = []
        for image in masks.values():
            mask = SimpleITK.Image(image.GetSize(), SimpleITK.sitkUInt8)
            mask.CopyInformation(image)
            for code in msd.codes(region):
                mask = mask | (image == code)
            pair.append(mask)
        overlap = SimpleITK.LabelOverlapMeasuresImageFilter()
        overlap.Execute(*pair)
        assert ours[region] == pytest.approx(overlap.GetDiceCoefficient(), abs=1e-9)


def test_empty_masks_and_where_the_others_differ() -> None:
    empty, full = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    assert dice(empty, empty) == 1
    assert dice(full, empty) == 0
    assert dice(empty, full) == 0
    # MONAI leaves cases with an empty reference out of its mean (NaN) unless told otherwise ...
    one = torch.zeros(1, 1, 4, 4, 4)
    assert torch.isnan(DiceMetric(reduction="none")(one, one)).all()
    # ... and then agrees with us
    metric = DiceMetric(reduction="none", ignore_empty=False)
    assert metric(one, one).item() == 1
    assert metric(one + 1, one).item() == 0
    # SimpleITK calls 0 / 0 infinite or not a number
    image = SimpleITK.GetImageFromArray(empty.astype(np.uint8))
    overlap = SimpleITK.LabelOverlapMeasuresImageFilter()
    overlap.Execute(image, image)
    assert not np.isfinite(overlap.GetDiceCoefficient())


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="reference"):
        dice(np.zeros((2, 2, 2), bool), np.zeros((2, 2, 3), bool))
