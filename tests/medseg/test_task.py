"""Segmentation as the engine sees it: crops larger than the cases are padded and told."""

from pathlib import Path

import pytest
from conftest import TINY
from launch_helpers import run_main


@pytest.mark.parametrize("resident", ["on", "off"])
def test_training_on_cases_smaller_than_the_crop(
    resident: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The phantoms have 40 to 56 voxels an axis."""
    sets = (*TINY, "data.crop=32,64,32", "data.foreground=0.5", f"data.resident={resident}")
    words = [part for item in sets for part in ("--set", item)]
    assert run_main("train", "brats_segresnet_demo", "--cache", cache, "--out", tmp_path / "run", *words) == 0
    told = capsys.readouterr().out
    assert (
        told.count("note: 4 of 4 training cases are smaller than the crop 32 x 64 x 32 and are padded with zeros") == 1
    )
    assert (tmp_path / "run" / "done.json").exists()
    words = [part for item in (*TINY, f"data.resident={resident}") for part in ("--set", item)]
    assert run_main("train", "brats_segresnet_demo", "--cache", cache, "--out", tmp_path / "other", *words) == 0
    assert "smaller than the crop" not in capsys.readouterr().out
