"""A sweep end to end on this machine, a member that fails, and the shell scripts."""

import csv
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launch_helpers import ROOT, run_main, run_script
from matplotlib.image import imread

from medlaunch.plan import Request, check_keeps, make_plan
from medseg import table
from medtrain.errors import UserError
from medtrain.results import means, read_rows, write_rows

SETS = ("data.crop=32,32,32", "train.epochs=1", "train.validate_every=1", "data.val_fraction=0.4")
QUICK = [part for item in SETS for part in ("--set", item)]


@pytest.fixture(scope="module")
def sweep(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished sweep in a folder with a blank, a quote and an umlaut, and what it printed."""
    out = tmp_path_factory.mktemp("sweeps") / "it's ä sweep"
    done = run_script(
        "sweep", "brats_demo", "--data", phantoms, "--out", out, *QUICK, environment={"OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def test_table_and_figures(sweep: tuple[Path, str]) -> None:
    out, printed = sweep
    table = list(csv.DictReader((out / "table.csv").open(encoding="utf-8")))
    assert [line["member"] for line in table] == ["brats_segresnet_demo", "brats_unetr_demo", "Ensemble"]
    distances = ["HD95 TC", "HD95 WT", "HD95 ET"]
    dice = ["Dice mean", "TC", "WT", "ET"]
    bounds = [f"{name} {end}" for name in dice for end in ("low", "high")]
    assert list(table[0]) == ["member", *dice, *distances, *bounds, "label map", "cases", "epochs", "note"]
    rows = read_rows(out / "cases.csv")
    for line in table:
        scores = means(row for row in rows if row.member == line["member"])
        assert float(line["Dice mean"]) == pytest.approx(scores["mean"], abs=5e-4)
        for name in distances:
            assert float(line[name]) == pytest.approx(scores[name], abs=5e-3)
        for name in dice:
            low, mean, high = (float(line[key]) for key in (f"{name} low", name, f"{name} high"))
            both = [row.scores[name.replace("Dice ", "")] for row in rows if row.member == line["member"]]
            assert (low, high) == pytest.approx((min(both), max(both)), abs=5e-4)  # of two cases a quarter is one twice
            assert low <= mean <= high
        assert line["cases"] == "2"
        assert line["label map"] == "msd"
    markdown = (out / "table.md").read_text()
    assert markdown.strip() in printed
    assert "Empty reference and empty prediction count 1" in markdown
    low, high = (float(table[0][f"Dice mean {end}"]) for end in ("low", "high"))
    assert f"{table[0]['Dice mean']} (" in markdown
    assert re.search(r"\| +Dice mean +\|", markdown)
    told = re.search(r"brats_segresnet_demo +\| +[\d.]+ \(([\d.]+)–([\d.]+)\)", markdown)
    assert told is not None
    assert [float(end) for end in told.groups()] == pytest.approx([low, high], abs=6e-3)
    cases = {row.case for row in rows}
    for name in [*cases, "dice"]:
        assert imread(out / "figures" / f"{name}.png").std() > 0.05


@pytest.mark.distributed
def test_validation_weights_are_judged_on_test_cases(phantoms: Path, tmp_path: Path) -> None:
    """With two processes a member, as on a workstation with two GPUs."""
    extra = [*QUICK[:-2], "--set", "data.val_fraction=0.2", "--set", "data.test_fraction=0.4", "--set",
             "train.batch=2", "--processes", "2"]  # fmt: skip
    done = run_script("sweep", "brats_demo", "--data", phantoms, "--out", tmp_path, *extra, "--weights", "validation",
                      environment={"OMP_NUM_THREADS": "2"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Judged on test cases" in done.stdout
    assert done.stdout.count("2 processes on CPU with 1 threads") == 2
    assert "validation weights of brats_segresnet_demo, brats_unetr_demo" in done.stdout
    rows = read_rows(tmp_path / "cases.csv")
    assert {row.part for row in rows} == {"test"}
    split = json.loads(next(tmp_path.glob("brats_*/split.json")).read_text())
    assert {row.case for row in rows} == set(split["test"])
    assert not set(split["test"]) & {*split["train"], *split["val"]}


def test_a_second_call_trains_nothing_again(sweep: tuple[Path, str], phantoms: Path) -> None:
    out, _ = sweep
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/checkpoint_last.pt")}
    assert len(before) == 2
    done = run_script("sweep", "brats_demo", "--data", phantoms, "--out", out, *QUICK)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("is done already") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_final_job_that_was_cut_off_goes_on(
    sweep: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(sweep[0], tmp_path / "sweep"))
    before = {name: (out / name).read_bytes() for name in ("cases.csv", "table.csv", "table.md")}
    (out / "ensemble.jsonl").unlink()
    real, calls = table.native_probs, []

    def cut_off(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(table, "native_probs", cut_off)
    assert run_main("finish", out) == 130
    with open(out / "ensemble.jsonl", "a") as file:
        file.write('{"key": "of a line that was cut o')
    assert run_main("finish", out) == 0
    assert "1 of 2 cases are predicted already" in capsys.readouterr().out
    assert len(calls) == 3
    assert {name: (out / name).read_bytes() for name in before} == before
    text = (out / "ensemble.jsonl").read_text()
    (out / "ensemble.jsonl").write_text(text.replace('"Ensemble"', '"what a member alone is called"'))
    assert run_main("finish", out) == 0
    assert len(calls) == 5
    picture = next(path for path in (out / "figures").iterdir() if path.stem != "dice")
    picture.unlink()  # it is drawn again
    assert run_main("finish", out) == 0
    assert len(calls) == 6
    os.utime(next(out.glob("brats_unetr_demo*/checkpoint_best.pt")))  # other weights than those of the lines
    assert run_main("finish", out) == 0
    assert len(calls) == 8


def test_members_of_another_split_are_refused(
    sweep: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(sweep[0], tmp_path / "sweep"))
    judged = {row.case for row in read_rows(out / "cases.csv")}
    monkeypatch.setattr("medtrain.splits.draw_key", lambda seed, name: (name in judged, name))  # as another version may
    assert run_main("finish", out) == 2
    assert "was judged on other cases than its recipe holds out" in capsys.readouterr().err


def test_a_member_that_is_alone_has_pictures_too(sweep: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "alone"
    shutil.copytree(sweep[0], out)
    shutil.rmtree(out / "figures")
    plan = json.loads((out / "plan.json").read_text())
    (out / "plan.json").write_text(json.dumps({**plan, "members": plan["members"][:1]}))
    assert run_main("finish", out) == 0
    rows = read_rows(out / "cases.csv")
    assert {row.member for row in rows} == {"brats_segresnet_demo"}
    assert {path.stem for path in (out / "figures").iterdir()} == {*(row.case for row in rows), "dice"}


def test_runs_without_distances_stay_in_the_tables(sweep: tuple[Path, str], tmp_path: Path) -> None:
    """A member of an earlier version has Dice only: its cells are empty, the ensemble's are not."""
    out = tmp_path / "old"
    shutil.copytree(sweep[0], out)
    old = next(out.glob("brats_segresnet_demo-*/cases.csv"))
    rows = read_rows(old)
    write_rows(old, [replace(row, scores={n: v for n, v in row.scores.items() if "HD95" not in n}) for row in rows])
    assert run_main("finish", out) == 0
    lines = list(csv.DictReader((out / "table.csv").open(encoding="utf-8")))
    assert [bool(line["HD95 ET"]) for line in lines] == [False, True, True]
    assert float(lines[0]["ET"]) == pytest.approx(means(read_rows(old))["ET"], abs=5e-4)
    assert {"HD95 WT" in row.scores for row in read_rows(out / "cases.csv") if row.member == lines[0]["member"]} == {
        False
    }


def test_a_failed_member_is_a_row_with_its_reason(
    sweep: tuple[Path, str], phantoms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = sweep
    plan = json.loads((out / "plan.json").read_text())
    folder = out / plan["members"][1]["folder"]
    done = (folder / "done.json").read_text()
    (folder / "done.json").unlink()
    (folder / "failed.json").write_text(json.dumps({"reason": "RuntimeError: boom"}))
    try:
        assert run_main("finish", out) == 3
    finally:
        (folder / "done.json").write_text(done)
        (folder / "failed.json").unlink()
    printed = capsys.readouterr().out
    assert "failed: RuntimeError: boom" in printed
    assert run_main("finish", out) == 0
    assert "boom" not in capsys.readouterr().out


def test_a_replaced_cache_is_noticed(sweep: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = sweep
    about = next(out.glob("brats_segresnet_demo-*/cache.json"))
    text = about.read_text()
    about.write_text(json.dumps({**json.loads(text), "fingerprint": "0"}))
    try:
        assert run_main("finish", out) == 2
    finally:
        about.write_text(text)
    assert "trained on other data" in capsys.readouterr().err


def test_damaged_files_of_a_sweep_are_named(
    sweep: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = sweep
    damaged = tmp_path / "sweep"
    for name in ("plan.json", "done.json", "cache.json"):
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(out, damaged, ignore=shutil.ignore_patterns("jobs", "tensorboard"))
        next(damaged.rglob(name)).write_text("{")
        assert run_main("finish", damaged) == 2
        error = capsys.readouterr().err
        assert name in error
        assert "absent or damaged" in error


def test_refusals(sweep: tuple[Path, str], phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = sweep
    assert run_main("finish", tmp_path) == 2
    assert "no plan.json" in capsys.readouterr().err
    assert run_main("finish", out, "--weights", "validation") == 2
    assert "data.test_fraction" in capsys.readouterr().err
    plan = json.loads((out / "plan.json").read_text())
    asked = {**plan, "request": {**plan["request"], "weights": "validation"}}
    (out / "plan.json").write_text(json.dumps(asked))
    assert run_main("finish", out) == 2  # as the sweep was asked for
    assert "data.test_fraction" in capsys.readouterr().err
    (out / "plan.json").write_text(json.dumps(plan))
    assert run_main("sweep", "brain", "--data", phantoms, "--out", tmp_path / "s") == 2
    assert "choose brats" in capsys.readouterr().err
    arguments = ("sweep", "brats_demo", "--data", phantoms, "--out", tmp_path / "s", "--set")
    assert run_main(*arguments, "data.holdout=nobody") == 2
    assert "nobody is not in the data set" in capsys.readouterr().err
    for extra, words in (
        (("--processes", 0), "at least 1"),
        (("--processes", 3), "--set train.batch=3"),
        (("--weights", "validation"), "--set data.test_fraction"),
    ):
        assert run_main("sweep", "brats_demo", "--data", phantoms, "--out", tmp_path / "s", *QUICK, *extra) == 2
        assert words in capsys.readouterr().err
    assert not list((tmp_path / "s").glob("brats_*"))
    before = (out / "plan.json").read_bytes()
    assert run_main("sweep", "brats_demo", "--data", phantoms, "--out", out, *QUICK, "--set", "train.seed=7") == 2
    assert "holds another sweep: give another --out, or the options" in capsys.readouterr().err
    assert (out / "plan.json").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_no_data_is_refused_before_any_is_prepared(
    phantoms: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for sweep, data, extra, words in (
        ("brats_demo", phantoms, ("--set", "train.compile=replay"), "as there is no GPU: --set train.compile=auto"),
        ("brats_demo", phantoms, ("--cancers", "Brain"), "--cancers means nothing for brats_demo"),
        ("brats_demo", phantoms, ("--set", "train.zero=3"), "train.zero is DeepSpeed's"),
        ("multicancer_demo", pictures, ("--weights", "validation"), "--weights means nothing"),
        ("multicancer_demo", pictures, ("--label-map", "msd"), "--label-map means nothing"),
        ("multicancer_demo", pictures, ("--cancers", "Brain"), "Brain"),
        ("multicancer_demo", phantoms, (), "is a data set of scans"),
    ):
        assert run_main("sweep", sweep, "--data", data, "--out", tmp_path / "s", *extra) == 2
        assert words in capsys.readouterr().err
        assert not list((tmp_path / "s").glob("*.h5*"))


def test_a_job_that_raises_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from medlaunch.jobs import TrainJob
    from medslurm.local import follow_locally

    outcome = follow_locally(TrainJob("{}", "no.h5", str(tmp_path / "run")), tmp_path / "jobs", name="bad")
    assert not outcome.ok
    assert "no recipe of this program" in outcome.reason
    assert "no recipe of this program" in json.loads((tmp_path / "run" / "failed.json").read_text())["reason"]
    assert "bad failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script",
    [
        "slurm/brats.sh",
        "slurm/multicancer.sh",
        "slurm/env.sh",
        "slurm/install.sh",
        "tests/run.sh",
        "tests/gpu.sh",
        ".ci/run",
    ],
)
def test_shell_scripts_parse(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / script)], check=False).returncode == 0


@pytest.mark.parametrize("script", ["brats.sh", "multicancer.sh"])
def test_entry_scripts_explain_themselves(script: str) -> None:
    done = subprocess.run(["bash", str(ROOT / "slurm" / script), "--help"], capture_output=True, text=True, check=True)
    assert "--data DIR --out DIR" in done.stdout


IMAGE_SETS = ("data.size=32", "train.epochs=1", "train.batch=16", "train.workers=0", "model.mlp_ratio=0.02",
              "train.validate_every=1")  # fmt: skip


def test_a_sweep_of_images(pictures: Path, tmp_path: Path) -> None:
    """Four networks of one cancer, three ensembles, the baseline; a second call trains nothing again."""
    sets = [part for item in IMAGE_SETS for part in ("--set", item)]
    arguments = ("sweep", "multicancer_demo", "--data", pictures, "--out", tmp_path / "s", "--cancers", "Oral Cancer")
    done = run_script(*arguments, *sets, environment={"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr[-3000:]
    lines = list(csv.DictReader((tmp_path / "s" / "table.csv").open(encoding="utf-8")))
    assert [line["member"] for line in lines] == [
        "multicancer_densenet201_demo", "multicancer_mobilenetv3_demo", "multicancer_resnetv2_demo",
        "multicancer_vgg19_demo", "Ensemble, accuracy weights", "Ensemble, equal weights",
        "Ensemble, log-loss weights", "baseline (colour histogram)",
    ]  # fmt: skip
    assert len({line["images"] for line in lines}) == 1
    assert (tmp_path / "s" / "table.md").read_text().strip() in done.stdout
    assert len(list((tmp_path / "s" / "tables" / "oral_cancer").glob("confusion_*.png"))) == 8
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*/checkpoint_last.pt")}
    assert len(before) == 4
    done = run_script(*arguments, *sets)
    assert done.stdout.count("is done already") == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_refusals_of_image_sweeps(
    pictures: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDTRAIN_WEIGHTS", str(tmp_path / "none"))
    for arguments, words in (
        (("multicancer", "--data", pictures), "prepare.py weights"),
        (("multicancer_demo", "--data", pictures, "--cancers", "Oral"), "choose Oral Cancer"),
        (("multicancer_demo", "--data", pictures, "--cancers", "every", "--set", "data.cancer=every"), "leave one out"),
        (("multicancer_demo", "--data", phantoms), "is a data set of scans"),
        (("brats_demo", "--data", phantoms, "--cancers", "every"), "--cancers means nothing for brats_demo"),
        (("multicancer_demo", "--data", pictures, "--set", "data.test_fraction=0"), "at least 0.01"),
        (("multicancer_demo", "--data", pictures, "--set", "data.test_fraction=0.6", "--set", "data.val_fraction=0.6"),
         "leave nothing for training"),
    ):  # fmt: skip
        out = tmp_path / ("phantoms" if arguments[2] == phantoms else "pictures") / str(arguments[0])
        assert run_main("sweep", *arguments, "--out", out) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*/multicancer_*"))


def test_folds_and_seeds_make_an_ensemble_a_fold(phantoms: Path, tmp_path: Path) -> None:
    """Two folds, two seeds: four members, every case predicted by the two networks that did not see it."""
    out = tmp_path / "s"
    sets = [part for item in SETS[:3] for part in ("--set", item)]
    words = ("--models", "segresnet", "--folds", 2, "--seeds", 2)
    done = run_script("sweep", "brats_demo", "--data", phantoms, "--out", out, *words, *sets,
                      environment={"OMP_NUM_THREADS": "2"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    table = {line["member"]: line for line in csv.DictReader((out / "table.csv").open(encoding="utf-8"))}
    name = "brats_segresnet_demo"
    members = [f"{name} (fold {fold}{seed})" for fold in range(2) for seed in ("", ", seed 1")]
    assert list(table) == [*members, f"{name}, mean of 4", "Ensemble"]
    assert [table[member]["cases"] for member in members] == ["3", "3", "2", "2"]
    assert table["Ensemble"]["cases"] == "5"
    assert table["Ensemble"]["note"] == f"equal weights of {', '.join(members)}"
    means_of = [float(table[member]["Dice mean"]) for member in members]
    assert float(table[f"{name}, mean of 4"]["Dice mean"]) == pytest.approx(sum(means_of) / 4, abs=1e-3)
    rows = [row for row in read_rows(out / "cases.csv") if row.member == "Ensemble"]
    assert len({row.case for row in rows}) == 5
    assert float(table["Ensemble"]["Dice mean"]) == pytest.approx(means(rows)["mean"], abs=5e-4)


def test_a_sweep_takes_members_up_and_forgets_none_that_is_trained(tmp_path: Path) -> None:
    def planned(*sets: str, data: str = "/data", seeds: int = 1) -> dict[str, Any]:
        request = Request(sweep="brats_demo", data=data, sets=sets, seeds=seeds)
        return make_plan(request, request.recipes())

    first = planned()
    check_keeps(tmp_path, first, planned("train.seed=1"))  # nothing is trained yet
    run = tmp_path / first["members"][0]["folder"]
    run.mkdir()
    (run / "checkpoint_last.pt").touch()
    check_keeps(tmp_path, first, planned(seeds=2))
    for other in (planned("train.seed=1"), planned(data="/other")):
        with pytest.raises(UserError, match="holds another sweep: give another --out"):
            check_keeps(tmp_path, first, other)
