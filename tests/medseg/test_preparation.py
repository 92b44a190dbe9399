"""From files to the cache and back: what is stored is right, exact to invert, resumable, and refuses bad input."""

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from launch_helpers import run_main

from medseg.cache import Cache
from medseg.findings import (
    report_enhancement,
    report_heads,
    report_orientation,
    report_spacing,
    report_tissues,
    scans_voxels,
    voxel_sizes,
)
from medseg.geometry import Grid, paste, to_nifti
from medseg.preparation import Preparation, prepare_dataset
from medseg.recipes import SegRecipe
from medseg.task import SegTask
from medtrain import hdf5
from medtrain.errors import UserError


@pytest.mark.parametrize("spacing_mm", [0.0, 7.0])
def test_the_true_label_comes_back_exactly(phantoms: Path, tmp_path: Path, spacing_mm: float) -> None:
    cache = Cache(prepare_dataset(phantoms, tmp_path / "c.h5", Preparation(spacing_mm=spacing_mm), workers=2))
    assert len(cache.ids) == 5
    for case in cache.ids:
        grid = Grid.from_dict(cache.facts(case)["grid"])
        label = cache.read(case, "label_native" if spacing_mm else "label")
        image = to_nifti(paste(label, grid), grid)
        truth = nib.load(phantoms / "labelsTr" / f"{case}.nii.gz")
        scan = nib.load(phantoms / "imagesTr" / f"{case}.nii.gz")
        assert np.array_equal(np.asarray(image.dataobj), np.asarray(truth.dataobj))
        assert np.array_equal(image.affine, scan.affine)
        for key in ("qform_code", "sform_code", "xyzt_units"):
            assert image.header[key] == scan.header[key]


def test_image_is_zscored_over_the_brain_and_zero_outside(cache: Path) -> None:
    opened = Cache(cache)
    for case in opened.ids:
        image = opened.read(case, "image").astype(np.float64)
        brain = (image != 0).any(axis=0)
        assert np.abs(image[:, brain].mean(axis=1)).max() < 2e-3
        assert np.abs(image[:, brain].std(axis=1) - 1).max() < 2e-3
        assert image.dtype == np.float64
        assert not image[:, ~brain].any()


def test_resampled_cases_have_the_wanted_spacing_and_voxel_samples(phantoms: Path, tmp_path: Path) -> None:
    cache = Cache(prepare_dataset(phantoms, tmp_path / "c.h5", Preparation(spacing_mm=6.0)))
    for case in cache.ids:
        facts, size = cache.facts(case), cache.array(case, "label").shape
        native = Grid.from_dict(facts["grid"]).native
        for n, small, mm in zip(native, size, facts["voxel_mm"], strict=True):
            assert abs(small * 6.0 - n * mm) <= 3.0 + 1e-6
        label = cache.read(case, "label")
        for code in (1, 2, 3):
            voxels = cache.read(case, f"voxels_{code}")
            assert (label[tuple(voxels.T)] == code).all()


def test_a_second_call_goes_on_and_a_changed_file_is_made_anew(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "c.h5"
    shutil.copytree(phantoms, data)
    broken = data / "labelsTr" / "PHANTOM_004.nii.gz"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:300])
    assert run_main("prepare", "brats", "--data", data, "--out", out, "--strict") == 2
    assert str(broken) in capsys.readouterr().err
    assert not out.exists()
    assert not out.with_name("c.h5.set_aside.csv").exists()
    broken.write_bytes(whole)
    prepare_dataset(data, out, Preparation())
    assert "of 5 cases are prepared already" in capsys.readouterr().out
    assert not out.with_name("c.h5.parts").exists()
    prepare_dataset(data, out, Preparation())
    assert "already holds these 5 cases" in capsys.readouterr().out
    before = Cache(out).read("PHANTOM_000", "label")
    shutil.copy(data / "labelsTr" / "PHANTOM_001.nii.gz", data / "labelsTr" / "PHANTOM_000.nii.gz")
    shutil.copy(data / "imagesTr" / "PHANTOM_001.nii.gz", data / "imagesTr" / "PHANTOM_000.nii.gz")
    prepare_dataset(data, out, Preparation())
    assert not np.array_equal(before, Cache(out).read("PHANTOM_000", "label"))


def test_brats_case_folders_equal_the_msd_folder(phantoms: Path, cache: Path, tmp_path: Path) -> None:
    for case in Cache(cache).ids:
        folder = tmp_path / "brats" / case
        folder.mkdir(parents=True)
        image = nib.load(phantoms / "imagesTr" / f"{case}.nii.gz")
        for channel, name in enumerate(("flair", "t1", "t1ce", "t2")):
            volume = np.asarray(image.dataobj)[..., channel]
            nib.Nifti1Image(volume, image.affine).to_filename(folder / f"{case}_{name}.nii.gz")
        label = nib.load(phantoms / "labelsTr" / f"{case}.nii.gz")
        codes = np.array([0, 2, 1, 4], np.uint8)[np.asarray(label.dataobj)]
        nib.Nifti1Image(codes, image.affine).to_filename(folder / f"{case}_seg.nii.gz")
    made = Cache(prepare_dataset(tmp_path / "brats", tmp_path / "c.h5", Preparation()))
    assert made.labels["name"] == "brats18"
    peer = Cache(cache)
    for case in peer.ids:
        assert np.array_equal(made.read(case, "image"), peer.read(case, "image"))
        assert np.array_equal(made.read(case, "label") > 0, peer.read(case, "label") > 0)


def test_scans_of_clearly_different_voxels_are_told_unless_resampled(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("prepare", "brats", "--workers", 1, "--data")
    assert run_main(*arguments, phantoms, "--out", tmp_path / "alike.h5") == 0
    assert "voxels range" not in capsys.readouterr().out
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    for place in (IMAGE, LABEL):
        image = nib.load(data / place)
        stretched = nib.Nifti1Image(np.asarray(image.dataobj), np.diag([1, 1, 1.3, 1]) @ image.affine)
        stretched.to_filename(data / place)
    assert run_main(*arguments, data, "--out", tmp_path / "c.h5") == 0
    told = re.findall(r"note: voxels range from (.*) mm to (.*) mm and are kept .*--spacing-mm ([\d.]+) makes",
                      capsys.readouterr().out)  # fmt: skip
    assert len(told) == 1
    least, most = ([float(n) for n in words.split(" x ")] for words in told[0][:2])
    sizes = voxel_sizes(Cache(tmp_path / "c.h5"))
    assert least == pytest.approx(sizes.min(0), rel=0.01)
    assert most == pytest.approx(sizes.max(0), rel=0.01)
    assert most[2] > 1.2 * least[2]
    assert float(told[0][2]) == pytest.approx(4, rel=0.1)
    told_mm = scans_voxels(Cache(tmp_path / "c.h5"))
    for name, mm in (("voxel_mm", np.median(sizes, 0)), ("least_mm", sizes.min(0)), ("most_mm", sizes.max(0))):
        assert told_mm[name] == pytest.approx(mm, abs=1e-3)
    member = Preparation(**{name: tuple(mm) for name, mm in told_mm.items()})
    assert all(member.target_mm(mm) is None for mm in sizes)  # what it was trained on is not resampled
    assert member.target_mm(sizes.max(0) * 1.09) is None
    assert member.target_mm(sizes.max(0) * 1.12) == member.voxel_mm
    assert member.target_mm(sizes.min(0) * 0.88) == member.voxel_mm
    assert run_main(*arguments, data, "--out", tmp_path / "c6.h5", "--spacing-mm", 6) == 0
    assert "voxels range" not in capsys.readouterr().out
    assert scans_voxels(Cache(tmp_path / "c6.h5")) == {}


def test_a_cache_without_the_scans_voxel_sizes_has_no_median(cache: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(cache, tmp_path / "c.h5"))
    with h5py.File(path, "r+") as file:
        for case in file["cases"].values():
            facts = json.loads(hdf5.attribute(case, "facts"))
            case.attrs["facts"] = hdf5.text(json.dumps({**facts, "voxel_mm": [0.0, "x", 1.0]}))
    assert scans_voxels(Cache(path)) == {}
    assert not report_spacing(Cache(path))


def test_the_t1gd_check_warns_of_a_wrong_label_map(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_dataset(phantoms, tmp_path / "right.h5", Preparation())
    assert report_enhancement(Cache(tmp_path / "right.h5")) == []
    assert capsys.readouterr().err == ""
    prepare_dataset(phantoms, tmp_path / "wrong.h5", Preparation(), label_map="legacy")
    assert len(report_enhancement(Cache(tmp_path / "wrong.h5"))) >= 2
    assert "label map is probably wrong" in capsys.readouterr().err


def test_tissues_that_no_case_has_are_told(
    phantoms: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_tissues(Cache(cache)) == []
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    for path in (data / "labelsTr").glob("*.nii.gz"):
        image = nib.load(path)
        codes = np.asarray(image.dataobj)
        nib.Nifti1Image(np.where(codes == 3, 2, codes).astype(np.uint8), image.affine).to_filename(path)
    prepare_dataset(data, tmp_path / "c.h5", Preparation())
    assert report_tissues(Cache(tmp_path / "c.h5")) == ["enhancing"]
    assert "under label map msd no case has enhancing (code 3): is it right" in capsys.readouterr().err


def _listing(data: Path, change: Callable[[dict], None]) -> None:
    listing = json.loads((data / "dataset.json").read_text())
    change(listing)
    (data / "dataset.json").write_text(json.dumps(listing))


def _rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    image = nib.load(path)
    nib.Nifti1Image(change(np.asarray(image.dataobj)), image.affine).to_filename(path)


def _flatten_affine(path: Path) -> None:
    """Zero the affine's second row in the header's bytes (srow_y); nibabel itself would not write that."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[296:312] = bytes(16)
    content[254:256] = (1).to_bytes(2, "little")  # sform_code
    path.write_bytes(gzip.compress(content, 1))


def _with_nan(array: np.ndarray) -> np.ndarray:
    out = array.astype(np.float32)
    out[5, 5, 5, 1] = np.nan
    return out


def _mirror(path: Path) -> None:
    image = nib.load(path)
    affine = image.affine.copy()
    affine[:, 0] *= -1
    nib.Nifti1Image(np.asarray(image.dataobj), affine).to_filename(path)


def _two_patients_in_one_folder(data: Path) -> None:
    shutil.rmtree(data / "imagesTr")
    shutil.rmtree(data / "labelsTr")
    (data / "dataset.json").unlink()
    for patient in "ab":
        for name in ("flair", "t1", "t1ce", "t2", "seg"):
            (data / f"{patient}_{name}.nii.gz").write_bytes(b"x")


IMAGE, LABEL = "imagesTr/PHANTOM_000.nii.gz", "labelsTr/PHANTOM_000.nii.gz"
BAD = {
    "no dataset.json": (lambda d: (d / "dataset.json").unlink(), "no FLAIR|neither dataset.json"),
    "not JSON": (lambda d: (d / "dataset.json").write_text("{"), "dataset.json is not in MSD form"),
    "image without label": (lambda d: (d / LABEL).unlink(), "PHANTOM_000.nii.gz is listed .* not there"),
    "shapes differ": (lambda d: _rewrite(d / LABEL, lambda a: a[1:]), "must be on one grid"),
    "channel missing": (lambda d: _rewrite(d / IMAGE, lambda a: a[..., :3]), "all four channels"),
    "three dimensions": (lambda d: _rewrite(d / IMAGE, lambda a: a[..., 0]), "all four channels"),
    "NaN": (lambda d: _rewrite(d / IMAGE, _with_nan), "NaN"),
    "zero": (lambda d: _rewrite(d / IMAGE, np.zeros_like), "zero everywhere"),
    "label code": (lambda d: _rewrite(d / LABEL, lambda a: np.where(a == 3, 7, a).astype(np.uint8)), "code 7"),
    "truncated": (lambda d: (d / IMAGE).write_bytes((d / IMAGE).read_bytes()[:999]), "cut short or damaged"),
    "no gzip": (lambda d: (d / IMAGE).write_bytes(b"hello"), "cut short or damaged"),
    "affine": (lambda d: _flatten_affine(d / IMAGE), "not invertible"),
    "mirrored label": (lambda d: _mirror(d / LABEL), "another grid"),
    "bad header": (lambda d: (d / IMAGE).write_bytes(gzip.compress(bytes([92, 1]) + bytes(400))), "damaged"),
    "patients in one folder": (_two_patients_in_one_folder, "a_flair.nii.gz is cut short"),
    "channel order": (
        lambda d: _listing(d, lambda x: x.update(modality={"0": "T1w", "1": "FLAIR", "2": "t1gd", "3": "T2w"})),
        "'T1w' where FLAIR belongs",
    ),
    "twins": (lambda d: _listing(d, lambda x: x["training"].append(x["training"][0])), "two cases named PHANTOM_000"),
    "leaves": (lambda d: _listing(d, lambda x: x["training"][0].update(image="../x.nii.gz")), "outside the data"),
    "no cases": (lambda d: _listing(d, lambda x: x.update(training=[])), "no training case"),
    "labels": (lambda d: _listing(d, lambda x: x.update(labels={"0": "a", "1": "b"})), "--label-map"),
    "channels": (lambda d: _listing(d, lambda x: x.update(modality={"0": "CT"})), "lists 1 channels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(
    name: str, phantoms: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out" / "c.h5"
    shutil.copytree(phantoms, data)
    change, words = BAD[name]
    change(data)
    assert run_main("prepare", "brats", "--data", data, "--out", out, "--workers", 1, "--strict") == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("error: ")
    assert error.count("\n") == 0
    assert "Traceback" not in error
    assert re.search(words, error), error
    assert str(data) in error
    assert not out.exists()


def test_wrong_arguments(phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c.h5"
    for arguments, words in [
        (("--data", tmp_path / "absent"), "is not a folder"),
        (("--data", phantoms, "--label-map", "mds"), "'mds' is unknown"),
        (("--data", phantoms, "--spacing-mm", "-1"), "no voxel size"),
    ]:
        assert run_main("prepare", "brats", "--out", out, *arguments) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run_main("prepare", "brats", "--data", phantoms, "--out", tmp_path / "file" / "c.h5") == 2
    assert "writable --out" in capsys.readouterr().err


def test_a_list_of_patients_keeps_their_scans_on_one_side(
    phantoms: Path, cache: Path, tiny: Callable[..., SegRecipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(phantoms, tmp_path / "data"))
    out = prepare_dataset(folder, tmp_path / "c.h5", Preparation())
    ids = Cache(out).ids
    assert Cache(out).patients == {}
    (folder / "patients.csv").write_text("case,patient\n" + "".join(f"{case},Doe\n" for case in ids[:4]))
    prepare_dataset(folder, out, Preparation())
    assert "1 patients are told by patients.csv" in capsys.readouterr().out
    opened = Cache(out)
    assert opened.patients == dict.fromkeys(ids[:4], 0)
    assert b"Doe" not in out.read_bytes()
    assert all(intact for _, intact in opened.verify())
    assert opened.fingerprint != Cache(cache).fingerprint  # runs of before are not gone on with
    for seed in range(4):
        split = SegTask(tiny(f"data.split_seed={seed}", "data.val_fraction=0.2"), opened).split
        assert set(split.train) in ({*ids[:4]}, {ids[4]})
    prepare_dataset(folder, out, Preparation())
    assert "already holds these 5 cases" in capsys.readouterr().out
    (folder / "patients.csv").write_text("case,patient\nnobody,Doe\n")
    with pytest.raises(UserError, match="line 2: what stands under case is no case"):
        prepare_dataset(folder, out, Preparation())


def test_heads_with_their_skull_are_told(
    phantoms: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_heads(Cache(cache)) == []
    folder = Path(shutil.copytree(phantoms, tmp_path / "data"))
    name = "PHANTOM_001"
    scan = nib.load(folder / "imagesTr" / f"{name}.nii.gz")
    noisy = np.asarray(scan.dataobj) + 1.0  # the air is no longer zero
    nib.save(nib.Nifti1Image(noisy.astype(np.float32), scan.affine), folder / "imagesTr" / f"{name}.nii.gz")
    out = prepare_dataset(folder, tmp_path / "c.h5", Preparation())
    assert report_heads(Cache(out)) == [name]
    said = capsys.readouterr().err
    assert f"WARNING: 1 of 5 cases, such as {name}: each has signal in more than 90% of its box" in said


def test_scans_without_an_orientation_are_told(
    phantoms: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_orientation(Cache(cache)) == []
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    for path in (data / "imagesTr" / "PHANTOM_002.nii.gz", data / "labelsTr" / "PHANTOM_002.nii.gz"):
        image = nib.load(path)
        bare = nib.Nifti1Image(np.asarray(image.dataobj), None, image.header)
        bare.header["qform_code"] = bare.header["sform_code"] = 0
        bare.to_filename(path)
    prepare_dataset(data, tmp_path / "c.h5", Preparation())
    assert report_orientation(Cache(tmp_path / "c.h5")) == ["PHANTOM_002"]
    assert "1 of 5 cases, such as PHANTOM_002: no orientation is stated" in capsys.readouterr().err
