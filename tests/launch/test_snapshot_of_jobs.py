"""Jobs run the code that was submitted: whatever a job imports of this program lies in the sweep's snapshot."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import fake_slurm
import pytest
from launch_helpers import run_main

pytestmark = pytest.mark.slurm

# What the jobs' callables import, and with it all that a member, its preparation and the final job need.
LOOK = """
import json, sys
import medlaunch.jobs, medlaunch.report, medlaunch.run, medslurm.job, medslurm.submit
import medcls.preparation, medcls.table, medcls.task
import medseg.models, medseg.preparation, medseg.table, medseg.task
import medtrain.engine, medtrain.zero
ours = {name: module for name, module in sys.modules.items() if name.startswith("med")}
print(json.dumps({name: module.__file__ or next(iter(module.__path__)) for name, module in ours.items()}))
"""


def environment(script: str) -> dict[str, str]:
    """What a job's script exports before it starts Python."""
    words = [shlex.split(line) for line in script.splitlines() if line.startswith("export ")]
    return dict(re.fullmatch(r"(?s)(\w+)=(.*)", word[1]).groups() for word in words)  # type: ignore[union-attr, misc]


def test_every_module_of_a_job_lies_in_the_snapshot(slurm: Path, phantoms: Path, tmp_path: Path) -> None:
    out = tmp_path / "it's ä sweep"
    asked = ("--cluster", "lab", "--cluster-file", slurm / "clusters.toml", "--models", "segresnet")
    assert run_main("sweep", "brats_demo", "--data", phantoms, "--out", out, *asked) == 0
    told = environment(fake_slurm.scripts(slurm)[1])
    code = next((out / "code").iterdir())
    assert told["PYTHONPATH"] == str(code)
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=False, cwd="/",
                          env={**os.environ, **told})  # fmt: skip
    assert done.returncode == 0, done.stderr
    places = json.loads(done.stdout.splitlines()[-1])
    assert {name.split(".")[0] for name in places} == {path.name for path in code.iterdir() if path.is_dir()}
    assert "medkernels.region_dice" in places
    assert [name for name, place in places.items() if not Path(place).is_relative_to(code)] == []
