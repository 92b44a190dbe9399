"""The eight real cases: prepare, a few steps, evaluate, predict, geometry; at most 3 minutes."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from launch_helpers import run_main, run_script

from medseg.cache import Cache
from medseg.geometry import Grid, paste
from medseg.labels import KNOWN
from medseg.metrics import score_case
from medtrain.results import read_rows

HELD_OUT = ("TCIA01_378_1", "TCIA10_628_1")


@pytest.mark.real_data
def test_prepare_train_predict(real_brats: Path, tmp_path: Path) -> None:
    cache, run, out = tmp_path / "c.h5", tmp_path / "run", tmp_path / "predictions"
    assert run_main("prepare", "brats", "--data", real_brats, "--out", cache, "--spacing-mm", 2) == 0
    opened = Cache(cache)
    for case in opened.ids:
        grid = Grid.from_dict(opened.facts(case)["grid"])
        truth = np.asarray(nib.load(real_brats / "labelsTr" / f"{case}.nii.gz").dataobj)
        assert np.array_equal(paste(opened.read(case, "label_native"), grid), truth)
        # MSD's code 3 is the enhancing tumour: brighter on T1Gd than code 2, in every one of these cases
        assert opened.facts(case)["t1gd_contrast"] > 0
    sets = (f"data.holdout={','.join(HELD_OUT)}", "train.epochs=1", "data.crops_per_case=8", "evaluate.flips=false")
    arguments = [part for item in sets for part in ("--set", item)]
    done = run_script("train", "brats_segresnet_2mm", "--cache", cache, "--out", run, *arguments,
                      environment={"OMP_NUM_THREADS": "2"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row.case: row for row in read_rows(run / "cases.csv")}
    assert tuple(rows) == HELD_OUT
    for case in HELD_OUT:
        scan = real_brats / "imagesTr" / f"{case}.nii.gz"
        assert run_main("predict", "--members", run, "--image", scan, "--out", out) == 0
        found, source = nib.load(out / f"{case}.nii.gz"), nib.load(scan)
        assert found.shape == (240, 240, 155)
        assert np.array_equal(found.affine, source.affine)
        truth = np.asarray(nib.load(real_brats / "labelsTr" / f"{case}.nii.gz").dataobj)
        scores = score_case(np.asarray(found.dataobj), truth, KNOWN["msd"])
        assert scores["mean"] == pytest.approx(rows[case].scores["mean"], abs=5e-3)
        assert scores["WT"] > 0.2  # 48 steps are enough to find the tumour
