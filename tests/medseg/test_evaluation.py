"""Scores on another labelled data set: those of the written files, whatever its codes, and honest about seen cases."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from launch_helpers import check_refused, run_main

from medcls.recipes import ClsRecipe
from medlaunch.run import run
from medseg import evaluation
from medseg.labels import KNOWN
from medseg.metrics import score_case
from medseg.preparation import Preparation, prepare_dataset
from medseg.recipes import SegRecipe
from medtrain import checkpoint
from medtrain.results import CaseRow, means, read_rows


@pytest.fixture(scope="module")
def runs(
    phantoms: Path, cache: Path, tiny: Callable[..., SegRecipe], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """One member at the phantoms' own spacing (4 mm), one at 6 mm."""
    folder = tmp_path_factory.mktemp("runs")
    coarse = prepare_dataset(phantoms, folder / "c.h5", Preparation(spacing_mm=6.0))
    run(tiny("train.epochs=2", "train.validate_every=2"), cache, folder / "native")
    run(tiny("data.spacing_mm=6", "data.crop=16,16,16"), coarse, folder / "coarse")
    return [folder / "native", folder / "coarse"]


@pytest.fixture(scope="module")
def cohort(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last two phantoms under names of their own and in BraTS 2018's codes."""
    place = tmp_path_factory.mktemp("cohort")
    pairs = []
    for number in (3, 4):
        pair = {"image": f"./imagesTr/HOSPITAL_{number}.nii.gz", "label": f"./labelsTr/HOSPITAL_{number}.nii.gz"}
        for kind, name in pair.items():
            (place / name).parent.mkdir(exist_ok=True)
            source = nib.load(phantoms / f"{kind}sTr" / f"PHANTOM_00{number}.nii.gz")
            if kind == "label":
                codes = KNOWN["msd"].recode(np.asarray(source.dataobj).astype(np.uint8), KNOWN["brats18"])
                source = nib.Nifti1Image(codes, source.affine)
            nib.save(source, place / name)
        pairs.append(pair)
    labels = {"0": "background", "1": "necrotic core", "2": "edema", "4": "enhancing tumour"}
    listing = json.loads((phantoms / "dataset.json").read_text())
    (place / "dataset.json").write_text(json.dumps({**listing, "labels": labels, "training": pairs}))
    return place


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A cut off in the second prediction; the arguments of all."""
    real, calls = evaluation.native_probs, []

    def cut_off(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(evaluation, "native_probs", cut_off)
    return calls


def of(rows: list[CaseRow], member: str) -> dict[str, dict[str, float]]:
    return {row.case: dict(row.scores) for row in rows if row.member == member}


def test_a_cohort_in_other_codes_scores_what_its_written_files_do(
    runs: list[Path], cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_main("evaluate", "--members", *runs, "--data", cohort, "--out", out) == 0
    printed = capsys.readouterr()
    assert "WARNING" not in printed.err
    rows = read_rows(out / "cases.csv")
    assert [row.member for row in rows] == ["native"] * 2 + ["coarse"] * 2 + ["Ensemble"] * 2
    assert {row.part for row in rows} == {"cohort"}
    for name, members in {"native": runs[:1], "coarse": runs[1:], "Ensemble": runs}.items():
        found = of(rows, name)
        assert set(found) == {"HOSPITAL_3", "HOSPITAL_4"}
        assert run_main("predict", "--members", *members, "--image", cohort / "imagesTr", "--out", tmp_path / name) == 0
        for case, scores in found.items():
            file, truth = (nib.load(place / f"{case}.nii.gz") for place in (tmp_path / name, cohort / "labelsTr"))
            codes = KNOWN["brats18"].recode(np.asarray(truth.dataobj).astype(np.uint8), KNOWN["msd"])
            again = score_case(np.asarray(file.dataobj), codes, KNOWN["msd"], truth.header.get_zooms()[:3])
            assert scores == pytest.approx(again, rel=1e-6, abs=1e-6)
    table = {line["member"]: line for line in csv.DictReader((out / "table.csv").open(encoding="utf-8"))}
    assert list(table) == ["native", "coarse", "Ensemble"]
    for name, line in table.items():
        expected = means(row for row in rows if row.member == name)
        assert float(line["Dice mean"]) == pytest.approx(expected["mean"], abs=5e-4)
        assert float(line["HD95 WT"]) == pytest.approx(expected["HD95 WT"], abs=5e-3)
        assert (line["cases"], line["label map"]) == ("2", "msd")
        assert float(line["WT low"]) <= float(line["WT"]) <= float(line["WT high"])
    assert [table[name]["epochs"] for name in table] == ["2", "1", ""]
    assert table["native"]["note"] == ""
    assert table["Ensemble"]["note"] == "equal weights of native, coarse"
    text = (out / "table.md").read_text()
    assert "Judged on 2 of 2 labelled cases" in text
    assert "label map brats18" in text
    assert text.strip() in printed.out


def test_an_evaluation_that_was_cut_off_goes_on(
    runs: list[Path], cohort: Path, calls: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("evaluate", "--members", *runs, "--out", tmp_path / "out", "--data", cohort)
    assert run_main(*words) == 130
    assert not (tmp_path / "out" / "table.md").exists()
    first = shutil.copytree(tmp_path / "out", tmp_path / "first")
    assert run_main(*words) == 0
    assert "1 of 2 cases are judged already" in capsys.readouterr().out
    assert len(calls) == 3
    assert [path.name for path in (tmp_path / "out").glob("*.jsonl")] == []
    again = [part if part != tmp_path / "out" else first for part in words]
    os.utime(cohort / "labelsTr" / "HOSPITAL_3.nii.gz")  # the case that was judged has changed
    assert run_main(*again) == 0
    assert "judged already" not in capsys.readouterr().out
    assert len(calls) == 5
    assert run_main(*words[:-3], tmp_path / "whole", *words[-2:]) == 0
    for name in ("cases.csv", "table.csv", "table.md"):
        told = {(place / name).read_bytes() for place in (tmp_path / "out", first, tmp_path / "whole")}
        assert len(told) == 1, name


def test_codes_that_were_corrected_meanwhile_are_judged_again(
    runs: list[Path], cohort: Path, calls: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(cohort, tmp_path / "data"))
    right = json.loads((data / "dataset.json").read_text())
    wrong = {"0": "background", "1": "necrotic core", "4": "edema", "2": "enhancing tumour"}
    (data / "dataset.json").write_text(json.dumps({**right, "labels": wrong}))
    words = ("evaluate", "--members", runs[0], "--out", tmp_path / "out", "--data", data)
    assert run_main(*words) == 130
    labels = {**wrong, "2": "edema", "4": "necrotic core", "1": "enhancing tumour"}  # of no known name either
    (data / "dataset.json").write_text(json.dumps({**right, "labels": labels}))
    assert run_main(*words) == 0
    assert "judged already" not in capsys.readouterr().out
    assert len(calls) == 4


def test_a_case_that_can_not_be_used_does_not_stop_the_others(
    runs: list[Path], cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = Path(shutil.copytree(cohort, tmp_path / "data")), tmp_path / "out"
    label = next((data / "labelsTr").glob("HOSPITAL_3*"))
    scan = nib.load(label)
    nib.save(nib.Nifti1Image(np.full(scan.shape, 9, np.uint8), scan.affine), label)
    assert run_main("evaluate", "--members", runs[0], "--data", data, "--out", out) == 3
    assert "set aside: HOSPITAL_3" in capsys.readouterr().err
    assert [row.case for row in read_rows(out / "cases.csv")] == ["HOSPITAL_4"]
    assert "Judged on 1 of 2 labelled cases" in (out / "table.md").read_text()
    assert "HOSPITAL_3" in (out / "set_aside.csv").read_text()


def test_a_cache_scores_what_the_run_says_and_seen_cases_are_counted(
    runs: list[Path], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_main("evaluate", "--members", runs[0], "--cache", cache, "--out", out) == 0
    found = of(read_rows(out / "cases.csv"), "native")
    assert len(found) == 5
    for row in read_rows(runs[0] / "cases.csv"):
        assert found[row.case] == pytest.approx(row.scores, abs=1e-6)
    (line,) = csv.DictReader((out / "table.csv").open(encoding="utf-8"))
    assert line["note"] == "4 of 5 cases were in training, 1 of 5 cases chose the checkpoint"
    assert "WARNING: native, by the cases' names: 4 of 5 cases were in training" in capsys.readouterr().err
    copy = tmp_path / "weights only"
    copy.mkdir()
    for name in ("recipe.json", checkpoint.BEST):
        shutil.copy(runs[0] / name, copy / name)
    assert run_main("evaluate", "--members", copy, "--cache", cache, "--out", out) == 0
    (line,) = csv.DictReader((out / "table.csv").open(encoding="utf-8"))
    assert (line["member"], line["note"]) == ("weights only", "seen cases unknown (no split.json)")


def test_other_scans_of_patients_in_training_are_counted(runs: list[Path], cohort: Path, tmp_path: Path) -> None:
    run, data = Path(shutil.copytree(runs[0], tmp_path / "run")), Path(shutil.copytree(cohort, tmp_path / "data"))
    (run / "split.json").write_text(json.dumps({"train": ["sub-01_ses-1"], "val": ["HOSPITAL_4"], "test": []}))
    for path in data.rglob("HOSPITAL_3*"):
        path.rename(path.with_name(path.name.replace("HOSPITAL_3", "sub-01_ses-2")))
    listing = data / "dataset.json"
    listing.write_text(listing.read_text().replace("HOSPITAL_3", "sub-01_ses-2"))
    assert run_main("evaluate", "--members", run, "--data", data, "--out", tmp_path / "out") == 0
    (line,) = csv.DictReader((tmp_path / "out" / "table.csv").open(encoding="utf-8"))
    assert line["note"] == "1 of 2 cases are of patients in training, 1 of 2 cases chose the checkpoint"


def test_members_of_one_name_are_told_by_their_paths(runs: list[Path], cohort: Path, tmp_path: Path) -> None:
    twin = tmp_path / "other" / "native"
    shutil.copytree(runs[0], twin)
    assert run_main("evaluate", "--members", runs[0], twin, "--data", cohort, "--out", tmp_path / "out") == 0
    rows = read_rows(tmp_path / "out" / "cases.csv")
    assert [row.member for row in rows[::2]] == [str(runs[0].resolve()), str(twin.resolve()), "Ensemble"]
    assert rows[0].scores == rows[2].scores == rows[4].scores


def test_refusals(
    runs: list[Path], cohort: Path, cache: Path, image_cache: Path, tiny_images: Callable[..., ClsRecipe],
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    native, coarse = runs
    out, damaged, images = tmp_path / "out", tmp_path / "damaged", tmp_path / "images"
    shutil.copytree(native, damaged)
    (damaged / "split.json").write_text('{"train": ["a"], "val": [1]}')
    images.mkdir()
    (images / "recipe.json").write_text(tiny_images().to_json())
    capfd.readouterr()
    for members, source, named, words in [
        ([native, coarse], ("--cache", cache), str(cache), "prepared at 0 mm.*give --data"),
        ([native], ("--data", cohort, "--label-map", "legacy"), str(cohort), "code 4|under one --label-map"),
        ([native, native], ("--data", cohort), str(native), "named twice"),
        ([damaged], ("--data", cohort), str(damaged / "split.json"), "damaged"),
        ([native], ("--data", cohort / "imagesTr"), str(cohort), "neither dataset.json"),
        ([native], ("--data", tmp_path / "none"), "none", "is not a folder"),
        ([native], ("--cache", cohort / "dataset.json"), "dataset.json", "not an HDF5 file"),
        ([native], ("--cache", image_cache), str(image_cache), "needs one of volumes"),
        ([images], ("--data", cohort), str(images), "is for volumes"),
    ]:
        code = run_main("evaluate", "--members", *members, *source, "--out", out)
        check_refused(code, capfd.readouterr().err, named, words, out)
    assert run_main("evaluate", "--members", native, "--data", cohort, "--out", native) == 2
    assert "belongs to a run" in capfd.readouterr().err
    before = sorted((cohort / "labelsTr").iterdir())
    assert run_main("evaluate", "--members", native, "--data", cohort, "--out", cohort / "labelsTr") == 2
    assert "belongs to a data set" in capfd.readouterr().err
    assert sorted((cohort / "labelsTr").iterdir()) == before


def test_one_scan_of_other_voxels_in_a_cache_is_enough(
    runs: list[Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By --data it would be resampled: the two ways must not give two scores."""
    monkeypatch.setattr("medseg.cohort.voxel_sizes", lambda cache: np.array([[4.0, 4, 4]] * 4 + [[1.0, 1, 5]]))
    assert run_main("evaluate", "--members", runs[0], "--cache", cache, "--out", tmp_path / "out") == 2
    assert "has voxels of 1 x 1 x 5 mm" in capfd.readouterr().err


def test_a_cohort_of_damaged_cases_leaves_no_table(
    runs: list[Path], cohort: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "cohort"
    shutil.copytree(cohort, place)
    for label in (place / "labelsTr").iterdir():
        label.write_bytes(label.read_bytes()[:200])
    assert run_main("evaluate", "--members", runs[0], "--data", place, "--out", tmp_path / "out") == 2
    said = capfd.readouterr().err
    assert f"no case of {place} can be used" in said
    assert "HOSPITAL_4.nii.gz is cut short" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set_aside.csv"]
