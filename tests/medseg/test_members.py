"""Prediction from raw scans: same preparation as in training, and back on the scan's own grid, in its own codes."""

import csv
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from launch_helpers import run_main

from medlaunch.run import run
from medseg import infer, prediction
from medseg.cache import Cache
from medseg.cases import CaseFiles
from medseg.geometry import Grid
from medseg.labels import KNOWN
from medseg.members import Member, load_members, native_probs
from medseg.metrics import ONE_EMPTY_MM, score_case
from medseg.preparation import Preparation, prepare_case, prepare_dataset
from medseg.recipes import SegRecipe
from medseg.scan import read_scan
from medseg.task import SegTask
from medtrain import checkpoint
from medtrain.errors import UserError
from medtrain.results import read_rows


@pytest.fixture(scope="module")
def coarse(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms (4 mm) at 6 mm."""
    return prepare_dataset(phantoms, tmp_path_factory.mktemp("coarse") / "c.h5", Preparation(spacing_mm=6.0))


@pytest.fixture(scope="module")
def runs(
    cache: Path, coarse: Path, tiny: Callable[..., SegRecipe], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """One member at the phantoms' own spacing, one at 6 mm."""
    folder = tmp_path_factory.mktemp("runs")
    run(tiny("train.epochs=3", "train.validate_every=3"), cache, folder / "native")
    run(tiny("data.spacing_mm=6", "data.crop=16,16,16", "train.epochs=3", "train.validate_every=3"), coarse,
        folder / "coarse")  # fmt: skip
    return [folder / "native", folder / "coarse"]


@pytest.mark.parametrize("which", [0, 1])
def test_a_predicted_file_scores_what_the_run_says(
    which: int, runs: list[Path], phantoms: Path, tmp_path: Path
) -> None:
    """A member trained at 6 mm takes the 4 mm file and answers at 4 mm; the table's Dice is that of the file."""
    rows = read_rows(runs[which] / "cases.csv")
    assert rows
    for row in rows:
        scan = phantoms / "imagesTr" / f"{row.case}.nii.gz"
        assert run_main("predict", "--members", runs[which], "--image", scan, "--out", tmp_path) == 0
        found, source = nib.load(tmp_path / f"{row.case}.nii.gz"), nib.load(scan)
        assert found.shape == source.shape[:3]
        assert np.array_equal(found.affine, source.affine)
        assert found.get_data_dtype() == np.uint8
        truth = np.asarray(nib.load(phantoms / "labelsTr" / f"{row.case}.nii.gz").dataobj)
        label_map = Member.load(runs[which], torch.device("cpu")).label_map
        scores = score_case(np.asarray(found.dataobj), truth, label_map, source.header.get_zooms()[:3])
        masks = [
            SimpleITK.ReadImage(str(file)) > 0
            for file in (tmp_path / f"{row.case}.nii.gz", phantoms / "labelsTr" / f"{row.case}.nii.gz")
        ]
        overlap = SimpleITK.LabelOverlapMeasuresImageFilter()
        overlap.Execute(*masks)
        assert overlap.GetDiceCoefficient() == pytest.approx(scores["WT"], abs=1e-9)
        # preparing without the label may crop a voxel tighter where tumour leaves the brain
        assert scores["WT"] == pytest.approx(row.scores["WT"], abs=5e-3)
        assert scores["HD95 WT"] == pytest.approx(row.scores["HD95 WT"], abs=0.5)
        assert (scores["HD95 ET"] == ONE_EMPTY_MM) == (row.scores["HD95 ET"] == ONE_EMPTY_MM)


MAPS = [f"PHANTOM_00{i}.nii.gz" for i in range(5)]


def test_a_folder_and_several_members(runs: list[Path], phantoms: Path, tmp_path: Path) -> None:
    code = run_main("predict", "--members", *runs, "--image", phantoms / "imagesTr", "--out", tmp_path, "--weights",
                    1, 3)  # fmt: skip
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [*MAPS, "members.json"]


def test_a_prediction_that_was_cut_off_goes_on(
    runs: list[Path],
    phantoms: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scans = Path(shutil.copytree(phantoms / "imagesTr", tmp_path / "scans"))
    real, calls = prediction.predict_scan, []

    def cut_off(case: CaseFiles, *arguments: Any) -> None:
        calls.append(case.id[-1])
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(case, *arguments)
        if len(calls) == 2:  # the scan is replaced meanwhile
            os.utime(case.images[0])

    monkeypatch.setattr(prediction, "predict_scan", cut_off)
    out = tmp_path / "out"
    words = ("predict", "--members", runs[0], "--image", scans, "--out", out)
    assert run_main(*words) == 130
    (out / "PHANTOM_000.nii.gz").write_bytes(b"not what was written")
    assert run_main(*words) == 0
    assert "1 of 5 scans are predicted already" in capsys.readouterr().out
    assert calls == [*"0123", *"0134"]
    assert sorted(path.name for path in out.iterdir()) == [*MAPS, "members.json"]
    assert nib.load(out / "PHANTOM_000.nii.gz").shape
    assert run_main(*words) == 0  # asked for again after its end: all of them
    assert len(calls) == 8 + 5


def test_members_of_different_label_maps_are_not_averaged(runs: list[Path], tmp_path: Path) -> None:
    content = checkpoint.load(runs[0] / checkpoint.BEST)
    content["label_map"]["name"] = "legacy"
    content["label_map"]["core"], content["label_map"]["enhancing"] = 3, 2
    checkpoint.save(tmp_path / checkpoint.BEST, content)
    with pytest.raises(UserError, match="share it"):
        load_members([runs[0], tmp_path], torch.device("cpu"))


def test_refusals(runs: list[Path], phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = phantoms / "imagesTr" / "PHANTOM_000.nii.gz"
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(scan.read_bytes()[:500])
    (tmp_path / "empty").mkdir()
    for members, image, extra, words in [
        ([tmp_path], scan, (), "recipe.json is not there"),
        (runs, tmp_path / "no.nii.gz", (), "no.nii.gz is not there"),
        (runs, bad, (), "cut short or damaged"),
        (runs, tmp_path / "empty", (), "holds no .nii"),
        (runs, phantoms / "labelsTr" / "PHANTOM_000.nii.gz", (), "all four channels"),
        (runs, scan, ("--weights", 1), "needs 2 numbers"),
    ]:
        out = tmp_path / "out"
        assert run_main("predict", "--members", *members, "--image", image, "--out", out, *extra) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error
        assert not out.exists() or not list(out.iterdir())


def test_a_scan_is_never_overwritten(
    runs: list[Path], phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = tmp_path / "a.nii.gz"
    scan.write_bytes((phantoms / "imagesTr" / "PHANTOM_000.nii.gz").read_bytes())
    before = scan.read_bytes()
    assert run_main("predict", "--members", runs[0], "--image", scan, "--out", tmp_path) == 2
    assert "is the scan itself" in capsys.readouterr().err
    (tmp_path / "a.nii").write_bytes(b"")
    assert run_main("predict", "--members", runs[0], "--image", tmp_path, "--out", tmp_path / "out") == 2
    assert "two scans named a" in capsys.readouterr().err
    task = tmp_path / "task"
    shutil.copytree(phantoms / "imagesTr", task / "imagesTs")
    assert run_main("predict", "--members", runs[0], "--image", task, "--out", task) == 2
    assert "is the folder of the scans" in capsys.readouterr().err
    assert [path.name for path in task.iterdir()] == ["imagesTs"]
    label = task / "labelsTr" / "PHANTOM_000.nii.gz"  # named as a prediction would be
    label.parent.mkdir()
    label.write_bytes(b"what an expert drew")
    (task / "dataset.json").write_text("{}")
    for out, owner in ((label.parent, "a data set"), (task / "imagesTr", "a data set"), (runs[0], "a run")):
        assert run_main("predict", "--members", runs[0], "--image", task / "imagesTs", "--out", out) == 2
        assert f"belongs to {owner}" in capsys.readouterr().err
    assert label.read_bytes() == b"what an expert drew"
    assert scan.read_bytes() == before


def test_native_dice_is_taken_on_the_original_spacing(coarse: Path, runs: list[Path]) -> None:
    opened = Cache(coarse)
    for row in read_rows(runs[1] / "cases.csv"):
        assert opened.array(row.case, "label_native").shape > opened.array(row.case, "label").shape


def test_validation_while_training_measures_no_surface(runs: list[Path]) -> None:
    for run_folder in runs:
        assert "HD95" not in (run_folder / "metrics.jsonl").read_text()
        assert "HD95 ET" in (run_folder / "cases.csv").read_text()


def test_neighbours_of_one_way_go_over_the_windows_together(
    runs: list[Path], cache: Path, coarse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native, low = load_members(runs, torch.device("cpu"))
    other = replace(native, forward=lambda windows: 2 * native.forward(windows))
    sets = {member.preparation: Cache(path) for member, path in ((native, cache), (low, coarse))}
    case = Cache(cache).ids[0]

    def prepared(preparation: Preparation) -> tuple[np.ndarray, Grid]:
        opened = sets[preparation]
        return opened.read(case, "image"), Grid.from_dict(opened.facts(case)["grid"])

    alone = [next(native_probs([member], prepared)) for member in (native, other, low)]
    sizes, plain = [], infer.member_probs

    def counted(forwards: list[Any], *rest: Any, **more: Any) -> Any:
        sizes.append(len(forwards))
        return plain(forwards, *rest, **more)

    monkeypatch.setattr(infer, "member_probs", counted)
    together = list(native_probs([native, other, low], prepared))
    assert sizes == [2, 1]
    for a, b in zip(alone, together, strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(together[0], together[1])


def thick(scan: Path, out: Path) -> Path:
    """The same head in voxels of half the width and four times the thickness."""
    image = nib.load(scan)
    array = np.asarray(image.dataobj).astype(np.float32)
    fine = array[:, :, : array.shape[2] // 4 * 4].repeat(2, 0).repeat(2, 1)
    slabs = fine.reshape(*fine.shape[:2], -1, 4, fine.shape[3]).mean(3)
    edges = np.diag([0.5, 0.5, 4.0, 1.0])
    edges[:3, 3] = [-0.25, -0.25, 1.5]
    nib.Nifti1Image(slabs, image.affine @ edges).to_filename(out)
    return out


def predicted(run: Path, scan: Path, out: Path) -> nib.Nifti1Image:
    assert run_main("predict", "--members", run, "--image", scan, "--out", out) == 0
    return nib.load(out / scan.name)


def test_a_scan_of_other_voxels_is_resampled_to_the_training_scans(
    runs: list[Path], phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = thick(phantoms / "imagesTr" / "PHANTOM_000.nii.gz", tmp_path / "thick.nii.gz")
    trained = Member.load(runs[0], torch.device("cpu")).preparation
    assert trained.voxel_mm == pytest.approx([4, 4, 4], rel=0.05)
    case = prepare_case("thick", read_scan(CaseFiles("thick", (scan,), None), KNOWN["msd"]), KNOWN["msd"], trained)
    native = Grid.from_dict(case.facts["grid"]).native
    for n, small, own, mm in zip(native, case.image_CDHW.shape[1:], case.facts["voxel_mm"], trained.voxel_mm or (),
                                 strict=True):  # fmt: skip
        assert abs(small * mm - n * own) <= mm / 2 + 1e-3
        assert small != n
    answer, source = predicted(runs[0], scan, tmp_path / "out"), nib.load(scan)
    told = [line for line in capsys.readouterr().out.splitlines() if "note:" in line]
    assert len(told) == 1
    assert "case thick has voxels of " in told[0]
    assert "it is resampled to theirs" in told[0]
    assert answer.shape == source.shape[:3]
    assert np.array_equal(answer.affine, source.affine)
    run_main("predict", "--members", runs[0], "--image", phantoms / "imagesTr" / "PHANTOM_000.nii.gz", "--out",
             tmp_path / "out")  # fmt: skip
    assert "note:" not in capsys.readouterr().out


def test_members_that_do_not_know_their_training_scans_voxels_predict_as_before(
    runs: list[Path], phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = thick(phantoms / "imagesTr" / "PHANTOM_000.nii.gz", tmp_path / "thick.nii.gz")
    content = checkpoint.load(runs[0] / checkpoint.BEST)
    del content["preparation"]["voxel_mm"]
    old = Path(shutil.copytree(runs[0], tmp_path / "old"))
    checkpoint.save(old / checkpoint.BEST, content)
    before = np.asarray(predicted(old, scan, tmp_path / "before").dataobj)
    assert "note:" not in capsys.readouterr().out
    assert not np.array_equal(before, np.asarray(predicted(runs[0], scan, tmp_path / "after").dataobj))
    assert Member.load(runs[1], torch.device("cpu")).preparation.voxel_mm is None  # it resamples every scan anyway


def test_which_voxels_are_apart() -> None:
    how = Preparation(voxel_mm=(1.0, 1.0, 2.0))
    for own, wanted in [
        ((1.0, 1.0, 2.0), None),
        ((1.1, 0.9, 2.2), None),
        ((1.11, 1.0, 2.0), how.voxel_mm),
        ((1.0, 1.0, 1.79), how.voxel_mm),
    ]:
        assert how.target_mm(own) == wanted
        assert Preparation().target_mm(own) is None
        assert replace(how, spacing_mm=3.0).target_mm(own) == (3.0, 3.0, 3.0)


def test_a_bad_scan_of_a_folder_does_not_stop_the_others(
    runs: list[Path], phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    good = (phantoms / "imagesTr" / "PHANTOM_000.nii.gz").read_bytes()
    for name, content in (("a", good[:500]), ("b", good), ("c", b""), ("d", good)):
        (scans / f"{name}.nii.gz").write_bytes(content)
    arguments = ("predict", "--members", runs[0], "--image", scans, "--out", out)
    assert run_main(*arguments) == 3
    told = capsys.readouterr()
    assert f"2 label maps in {out}" in told.out
    assert [line.split(" is ")[0] for line in told.err.splitlines() if line.startswith("set aside")] == [
        f"set aside: {name}: {name}.nii.gz" for name in "ac"
    ]
    assert f"2 scans set aside, listed in {out / 'set_aside.csv'}" in told.err
    assert sorted(path.name for path in out.iterdir()) == ["b.nii.gz", "d.nii.gz", "members.json", "set_aside.csv"]
    with open(out / "set_aside.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["case", "a", "c"]
    assert "cut short or damaged" in rows[1][1]
    for name in "ac":
        (scans / f"{name}.nii.gz").write_bytes(good)
    assert run_main(*arguments) == 0
    assert sorted(path.name for path in out.iterdir()) == [*(f"{name}.nii.gz" for name in "abcd"), "members.json"]
    assert run_main("predict", "--members", runs[1], *arguments[3:]) == 2
    assert f"error: {out} holds label maps of other members" in capsys.readouterr().err


def test_a_folder_of_bad_scans_only_is_an_error(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in "ab":
        (scans / f"{name}.nii.gz").write_bytes(b"")
    assert run_main("predict", "--members", runs[0], "--image", scans, "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err.splitlines()
    assert [line[:12] for line in told[:2]] == ["set aside: a", "set aside: b"]
    assert told[-1].startswith(f"error: no scan of {scans} can be used: see {tmp_path / 'out' / 'set_aside.csv'}")


def test_label_maps_need_a_folder(
    runs: list[Path], phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan, out = phantoms / "imagesTr" / "PHANTOM_000.nii.gz", tmp_path / "out.csv"
    assert run_main("predict", "--members", runs[0], "--image", scan, "--out", out) == 2
    assert "label maps of scans need a folder: give --out DIR." in capsys.readouterr().err
    assert not out.exists()


def test_a_case_folder_that_lacks_a_channel_does_not_stop_the_others(
    runs: list[Path], phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = nib.load(phantoms / "imagesTr" / "PHANTOM_000.nii.gz")
    for case in "ab":
        (tmp_path / "scans" / case).mkdir(parents=True)
        for channel, name in enumerate(("flair", "t1", "t1ce", "t2")):
            volume = np.asarray(image.dataobj)[..., channel]
            nib.Nifti1Image(volume, image.affine).to_filename(tmp_path / "scans" / case / f"{case}_{name}.nii.gz")
    (tmp_path / "scans" / "a" / "a_t1ce.nii.gz").unlink()
    arguments = ("predict", "--members", runs[0], "--image", tmp_path / "scans", "--out", tmp_path / "out")
    assert run_main(*arguments) == 3
    assert "set aside: a: a has no T1Gd file" in capsys.readouterr().err
    assert (tmp_path / "out" / "b.nii.gz").exists()
    shutil.rmtree(tmp_path / "scans" / "b")
    assert run_main(*arguments) == 2
    assert "has no T1Gd file" in capsys.readouterr().err


def test_kernels_are_tried_before_a_training_and_before_a_prediction(
    runs: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[torch.device] = []
    monkeypatch.setattr("medkernels.trial.try_kernels", tried.append)
    task = SegTask(Member.load(runs[0], torch.device("cpu")).recipe, Cache(cache))
    assert tried == []  # there is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    task.build_model()
    Member.load(runs[0], torch.device("cpu"))
    assert tried == [torch.device("cuda", 1)] * 2
