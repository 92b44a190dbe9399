"""`bash slurm/brats.sh` as a user runs it: phantoms, cache, two members, ensemble, table."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch_helpers import ROOT


@pytest.mark.slow
def test_brats_sh_reaches_its_dice(tmp_path: Path) -> None:
    venv = Path(sys.prefix)
    environment = {**os.environ, "MEDTRAIN_VENV": str(venv)}
    environment.pop("OMP_NUM_THREADS", None)
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "brats.sh"), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=1500,
        env=environment,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = {line["member"]: line for line in csv.DictReader((out / "table.csv").open(encoding="utf-8"))}
    assert list(table) == ["brats_segresnet_demo", "brats_unetr_demo", "Ensemble"]
    assert float(table["brats_segresnet_demo"]["WT"]) >= 0.85
    assert float(table["Ensemble"]["WT"]) >= 0.85
    assert "exit status 0" in done.stdout
