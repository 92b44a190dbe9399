"""A profile of some steps: a trace that tools open, and shares that add up; convolutions are looked at before."""

import json
from pathlib import Path

import pytest
import torch
from launch_helpers import run_main, run_script
from torch.nn import functional

from medtrain.errors import UserError
from medtrain.profiling import PARTS, shares
from medtrain.selftest import check_convolutions

CPU = torch.device("cpu")


def arguments(cache: Path, out: Path) -> tuple[object, ...]:
    sets = ("data.crop=32,32,32", "data.spacing_mm=0", "train.epochs=2", "train.batch=2", "train.workers=0",
            "train.precision=fp32", "train.log_every=1")  # fmt: skip
    words = [part for item in sets for part in ("--set", item)]
    return ("brats_segresnet_demo", "--cache", cache, "--out", out, *words)


def test_a_profile(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("train", *arguments(cache, tmp_path / "run"), "--profile", 2) == 0
    said = capsys.readouterr().out
    rows = {cells[1].strip(): cells for line in said.splitlines() if len(cells := line.split("|")) == 5}
    assert {*PARTS, "all-reduce"} <= set(rows)
    percent = [int(rows[part][3].strip().rstrip("%")) for part in PARTS]
    assert sum(percent) == pytest.approx(100, abs=2)
    assert float(rows["forward"][2]) > 0
    assert float(rows["backward"][2]) > 0
    (trace,) = (tmp_path / "run" / "profile").glob("*.json")
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("step/optimizer") == 2
    assert any("parts of a step: data " in line for line in said.splitlines())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    parts = [{part: line[f"speed/{part}_share"] for part in PARTS[1:]} for line in lines if "train/loss" in line]
    assert all(0 < sum(found.values()) <= 1.001 for found in parts)


def test_a_run_that_is_too_short_for_a_profile_says_so(cache: Path, tmp_path: Path) -> None:
    # in a process of its own: a profiler that is not ended brings the interpreter down when that ends
    done = run_script("train", *arguments(cache, tmp_path / "run"), "--profile", 90)
    assert done.returncode == 0, done.stderr
    assert "no profile: it needs 93 steps" in done.stdout
    assert not (tmp_path / "run" / "profile").exists()
    assert run_main("train", *arguments(cache, tmp_path / "other"), "--profile", -1) == 2


def test_shares_are_of_the_whole() -> None:
    assert shares({"data": 1.0, "forward": 3.0}) == "data 25 %, forward 75 %"
    assert shares({"data": 0.0}) == ""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_right_convolutions_pass(precision: str) -> None:
    check_convolutions(precision, CPU)


def test_wrong_convolutions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = functional.conv3d

    def wrong(image: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
        out = real(image, weight, padding=padding)
        return out * 1.1 if torch.is_autocast_enabled("cpu") else out

    monkeypatch.setattr(functional, "conv3d", wrong)
    with pytest.raises(UserError, match=r"convolves wrongly in bf16 .*--set train\.precision=fp32"):
        check_convolutions("bf16", CPU)
    check_convolutions("fp32", CPU)
