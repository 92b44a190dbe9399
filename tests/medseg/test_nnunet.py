"""nnU-Net's raw form: the same voxels and label map as from the Decathlon's form, and refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from launch_helpers import run_main

from medseg.labels import KNOWN
from medseg.msd import read_dataset
from medseg.nnunet import label_map
from medseg.prediction import find_images
from medseg.scan import read_scan
from medtrain.errors import UserError

NAMES = {"0": "T1", "1": "T1ce", "2": "T2", "3": "Flair"}  # nnU-Net's own order for BraTS
ORDER = (1, 2, 3, 0)  # of the phantoms' channels
REGIONS = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}


@pytest.fixture
def raw(phantoms: Path, tmp_path: Path) -> Path:
    """The phantoms as nnU-Net wants them."""
    root = tmp_path / "Dataset137_BraTS"
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (root / name).mkdir(parents=True)
    for path in sorted((phantoms / "imagesTr").glob("*.nii.gz")):
        image, case = nib.load(path), path.name.removesuffix(".nii.gz")
        for number, channel in enumerate(ORDER):
            volume = nib.Nifti1Image(np.asarray(image.dataobj)[..., channel], image.affine)
            for folder in ("imagesTr", "imagesTs"):
                volume.to_filename(root / folder / f"{case}_{number:04d}.nii.gz")
        shutil.copy(phantoms / "labelsTr" / path.name, root / "labelsTr" / path.name)
    told(root, channel_names=NAMES, labels=REGIONS, numTraining=5, file_ending=".nii.gz", regions_class_order=[1, 2, 3])
    return root


def told(root: Path, **listing: Any) -> None:
    (root / "dataset.json").write_text(json.dumps(listing))


def test_it_is_read_as_the_decathlons_form(raw: Path, phantoms: Path) -> None:
    ours, theirs = read_dataset(phantoms), read_dataset(raw)
    assert theirs.label_map == ours.label_map == KNOWN["msd"]
    assert [case.id for case in theirs.cases] == [case.id for case in ours.cases]
    for one, other in zip(ours.cases, theirs.cases, strict=True):
        scan, found = read_scan(one, ours.label_map), read_scan(other, theirs.label_map)
        np.testing.assert_array_equal(found.image_CXYZ, scan.image_CXYZ)
        np.testing.assert_array_equal(found.label_XYZ, scan.label_XYZ)
        np.testing.assert_array_equal(found.affine, scan.affine)


def test_it_is_prepared_to_the_same_cache(raw: Path, cache: Path, tmp_path: Path) -> None:
    from medseg.cache import Cache

    assert run_main("prepare", "brats", "--data", raw, "--out", tmp_path / "c.h5", "--workers", 1) == 0
    assert Cache(tmp_path / "c.h5").fingerprint == Cache(cache).fingerprint  # names and checksums of all arrays


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (REGIONS, KNOWN["msd"]),
        ({"background": 0, "edema": 1, "non-enhancing tumor": 2, "enhancing tumor": 3}, KNOWN["msd"]),
        ({"background": 0, "WT": [1, 2, 3], "TC": [1, 3], "ET": 3}, KNOWN["brats23"]),
        ({"background": 0, "a": [1, 2], "b": [2, 3], "c": [3]}, None),
        ({"background": 0, "a": 1, "b": 2, "c": 3}, None),
        ({"background": 0, "a": [1, 2, 3], "b": [1, "2"], "c": [[3]]}, None),
        ({"background": 0, "WT": [1, 2, 300], "TC": [1, 2], "ET": [1]}, None),
        ([1, 2, 3], None),
    ],
)
def test_labels_by_codes_and_by_regions(labels: Any, wanted: Any) -> None:
    assert label_map({"labels": labels}) == wanted


def test_scans_to_predict(raw: Path, tmp_path: Path) -> None:
    for place in (raw, raw / "imagesTs"):
        cases, _ = find_images(place)
        assert [case.id for case in cases] == [f"PHANTOM_00{i}" for i in range(5)]
        assert [path.name[-11:-7] for path in cases[0].images] == ["0003", "0000", "0001", "0002"]
    (raw / "imagesTs" / "PHANTOM_001_0002.nii.gz").unlink()
    cases, aside = find_images(raw)
    assert len(cases) == 4
    assert aside[0][0] == "PHANTOM_001"
    assert "PHANTOM_001_0002.nii.gz is not there" in aside[0][1]
    for n in (0, 2, 3, 4):
        (raw / "imagesTs" / f"PHANTOM_00{n}_0002.nii.gz").unlink()
    with pytest.raises(UserError, match="take the scan out"):
        find_images(raw)


@pytest.mark.parametrize("linked", ["a scan", "imagesTs"])
def test_scans_to_predict_do_not_lie_elsewhere(
    raw: Path, tmp_path: Path, linked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = raw / "imagesTs" / ("PHANTOM_001_0002.nii.gz" if linked == "a scan" else "")
    place.rename(tmp_path / "private")
    place.symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match=f"{place.name} is a link that leaves the data folder"):
        find_images(raw)
    if linked == "a scan":
        with pytest.raises(UserError, match="is a link that leaves the data folder"):
            find_images(raw / "imagesTs")
    else:
        assert len(find_images(raw / "imagesTs")[0]) == 5  # the user's own link
    monkeypatch.setenv("MEDTRAIN_FOLLOW_LINKS", "1")
    assert len(find_images(raw)[0]) == 5


def test_scans_may_be_links_within_the_data_folder(raw: Path) -> None:
    scan = raw / "imagesTs" / "PHANTOM_001_0002.nii.gz"
    scan.unlink()
    scan.symlink_to(raw / "imagesTr" / scan.name)
    assert len(find_images(raw)[0]) == 5
    with pytest.raises(UserError, match="is a link that leaves the data folder"):
        find_images(raw / "imagesTs")


@pytest.mark.parametrize("name", ["imagesTr", "labelsTr"])
def test_a_linked_folder_that_leaves_is_not_looked_into(raw: Path, tmp_path: Path, name: str) -> None:
    (raw / name).rename(tmp_path / "private")
    (raw / name).symlink_to(tmp_path / "private")
    (tmp_path / "private" / "Doe_0000.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match=f"{name} is a link that leaves the data folder"):
        read_dataset(raw)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a channel": (lambda r: (r / "imagesTr" / "PHANTOM_002_0001.nii.gz").unlink(), r"002_0001\.nii\.gz is not there"),
    "a label": (lambda r: (r / "labelsTr" / "PHANTOM_002.nii.gz").unlink(), r"002_0000\.nii\.gz has no label"),
    "all labels": (lambda r: shutil.rmtree(r / "labelsTr"), r"labelsTr holds no \.nii\.gz file"),
    "other channels": (lambda r: told(r, channel_names={"0": "CT"}, labels=REGIONS, file_ending=".nii.gz"),
                       "has no channel FLAIR among"),
    "no channels": (lambda r: told(r, labels=REGIONS, file_ending=".nii.gz"), "has no channel FLAIR"),
    "odd numbers": (lambda r: told(r, channel_names={**NAMES, "../3": "flair"}, labels=REGIONS, file_ending=".nii.gz"),
                    "has no channel FLAIR"),
    "pictures": (lambda r: told(r, channel_names=NAMES, labels=REGIONS, file_ending=".png"), "file_ending '.png'"),
    "other labels": (lambda r: told(r, channel_names=NAMES, labels={"a": 1}, file_ending=".nii.gz"), "give --label-m"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_refusals(what: str, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, words = SPOILT[what]
    spoil(raw)
    with pytest.raises(UserError, match=words) as caught:
        read_dataset(raw)
    assert str(raw) in str(caught.value)
    assert run_main("prepare", "brats", "--data", raw, "--out", tmp_path / "c.h5", "--workers", 1) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "c.h5").exists()
