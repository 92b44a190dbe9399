"""Our Dice and HD95 equal MONAI's on the same arrays and SimpleITK's on written files; empty masks are said aloud."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from monai.metrics import DiceMetric, compute_hausdorff_distance
from scipy import ndimage

from medseg.labels import KNOWN, REGIONS
from medseg.metrics import DICE, HD95, ONE_EMPTY_MM, dice, hd95, score_case


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


def smooth(seed: int, shape: tuple[int, ...] = (30, 26, 22)) -> np.ndarray:
    """A few round things, some of them cut off by the volume's edge."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.gaussian_filter(noise, 3) > 0.02


SPACING_MM = (0.9, 1.2, 3.0)


@pytest.mark.parametrize("seed", range(4))
def test_hd95_equals_monai(seed: int) -> None:
    p, r = smooth(seed), smooth(seed + 9)
    tensors = (torch.from_numpy(mask)[None, None] for mask in (p, r))
    monais = compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=SPACING_MM)
    assert hd95(p, r, SPACING_MM) == pytest.approx(monais.item(), rel=1e-5)
    assert hd95(r, p, SPACING_MM) == hd95(p, r, SPACING_MM)


def test_hd95_equals_simpleitk_on_anisotropic_voxels() -> None:
    """Distances to the other surface by SimpleITK's Maurer map, between contours by its filter."""
    masks = [np.pad(smooth(seed), 1) for seed in (1, 2)]  # its contours ignore the volume's edge
    contours, maps = [], []
    for mask in masks:
        image = SimpleITK.GetImageFromArray(mask.astype(np.uint8))
        image.SetSpacing(SPACING_MM[::-1])  # SimpleITK counts axes from the last
        contour = SimpleITK.LabelContour(image, fullyConnected=False)
        distance = SimpleITK.SignedMaurerDistanceMap(contour, squaredDistance=False, useImageSpacing=True)
        contours.append(SimpleITK.GetArrayFromImage(contour) > 0)
        maps.append(np.abs(SimpleITK.GetArrayFromImage(distance)))
    ways = [np.percentile(maps[1][contours[0]], 95), np.percentile(maps[0][contours[1]], 95)]
    assert hd95(masks[0], masks[1], SPACING_MM) == pytest.approx(max(ways), rel=1e-5)


def test_hd95_of_shifted_boxes_and_a_stray_voxel() -> None:
    reference = np.zeros((20, 20, 20), bool)
    reference[5:12, 5:12, 5:12] = True
    shifted = np.roll(reference, 2, axis=2)
    assert hd95(reference, reference, SPACING_MM) == 0
    assert hd95(shifted, reference, SPACING_MM) == pytest.approx(6.0)  # 2 voxels of 3 mm
    assert hd95(np.roll(reference, 2, axis=0), reference, SPACING_MM) == pytest.approx(1.8)
    stray = reference.copy()
    stray[0, 0, 0] = True  # one of 219 surface voxels: beyond the 95th percentile
    assert hd95(stray, reference, SPACING_MM) == 0


def test_hd95_of_empty_masks_is_that_of_brats() -> None:
    empty, full = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    assert hd95(empty, empty, SPACING_MM) == 0
    assert hd95(full, empty, SPACING_MM) == hd95(empty, full, SPACING_MM) == ONE_EMPTY_MM
    assert pytest.approx(np.linalg.norm((240, 240, 155)), abs=0.005) == ONE_EMPTY_MM


def test_a_case_has_hd95_where_its_voxels_are_known() -> None:
    msd = KNOWN["msd"]
    prediction, reference = blobs(1), blobs(2)
    assert list(score_case(prediction, reference, msd)) == list(DICE)
    scores = score_case(prediction, reference, msd, SPACING_MM)
    assert list(scores) == [*DICE, *HD95] == ["mean", "TC", "WT", "ET", "HD95 TC", "HD95 WT", "HD95 ET"]
    for region, p, r in zip(REGIONS, msd.regions(prediction), msd.regions(reference), strict=True):
        assert scores[f"HD95 {region}"] == hd95(p, r, SPACING_MM)


def test_shapes_must_agree() -> None:
    masks = np.zeros((2, 2, 2), bool), np.zeros((2, 2, 3), bool)
    with pytest.raises(ValueError, match="reference"):
        dice(*masks)
    with pytest.raises(ValueError, match="reference"):
        hd95(*masks, SPACING_MM)
