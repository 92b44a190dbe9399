"""`bash slurm/brats.sh` and `bash slurm/multicancer.sh` as a user runs them: phantoms, cache, members, tables."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch_helpers import ROOT


def run_job(script: str, out: Path, *options: str) -> str:
    """What the entry script printed; it must end well."""
    environment = {**os.environ, "MEDTRAIN_VENV": sys.prefix}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / script), "--out", str(out), *options],
        capture_output=True,
        text=True,
        timeout=2400,
        env=environment,
        check=False,
        cwd=out.parent,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "exit status 0" in done.stdout
    return done.stdout


@pytest.mark.slow
def test_brats_sh_reaches_its_dice(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_job("brats.sh", out, "--set", "train.epochs=8")  # of 16
    table = {line["member"]: line for line in csv.DictReader((out / "table.csv").open(encoding="utf-8"))}
    assert list(table) == ["brats_segresnet_demo", "brats_unetr_demo", "Ensemble"]
    assert float(table["brats_segresnet_demo"]["WT"]) >= 0.8
    assert float(table["Ensemble"]["WT"]) >= 0.8


@pytest.mark.slow
def test_multicancer_sh_beats_the_baseline(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # the harder one of its two cancers, the two quicker ones of its four networks
    printed = run_job(
        "multicancer.sh", out, "--cancers", "Brain Cancer", "--models", "mobilenetv3_small_100", "resnetv2_50"
    )
    lines = list(csv.DictReader((out / "table.csv").open(encoding="utf-8")))
    assert len(lines) == 2 + 3 + 1
    scores = {line["member"]: float(line["accuracy"]) for line in lines if line["cancer"] == "Brain Cancer"}
    assert scores["Ensemble, accuracy weights"] > scores["baseline (colour histogram)"] + 0.1, scores
    assert scores["Ensemble, accuracy weights"] >= 0.7, scores
    assert all(line["duplicates across"] == "0" for line in lines)
    assert "with a copy in training" in printed
