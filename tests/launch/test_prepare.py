"""prepare.py's other commands: verify and phantom."""

import shutil
from pathlib import Path

import h5py
import pytest
from launch_helpers import run_main, run_script


def test_verify(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "c.h5"
    shutil.copy(cache, copy)
    assert run_main("prepare", "verify", copy) == 0
    assert "5 cases are intact" in capsys.readouterr().out
    with h5py.File(copy, "r+") as file:
        file["cases/PHANTOM_002/image"][0, 0, 0, 0] += 1
    assert run_main("prepare", "verify", copy) == 2
    assert "PHANTOM_002" in capsys.readouterr().err


def test_phantom_makes_a_data_set_that_prepares(tmp_path: Path) -> None:
    done = run_script("prepare", "phantom", "--out", tmp_path / "p", "--cases", 2)
    assert done.returncode == 0, done.stderr
    assert "phantoms: 2/2" in done.stdout
    done = run_script("prepare", "brats", "--data", tmp_path / "p", "--out", tmp_path / "c.h5", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "prepare: 2/2" in done.stdout


@pytest.mark.parametrize("program", ["prepare", "train", "sweep", "predict", "finish", "evaluate"])
def test_help_needs_nothing(program: str) -> None:
    done = run_script(program, "--help")
    assert done.returncode == 0
    assert "usage:" in done.stdout
