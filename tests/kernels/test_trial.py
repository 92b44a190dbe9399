"""Kernels are tried against their references before they are trusted; one that is wrong is left out."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_checks import DEVICE

from medkernels import dispatch, trial, upsample_add
from medkernels.group_norm_relu import whole

SIDE = 48 if DEVICE == "cuda" else 6


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(trial, "_tried", set())
    monkeypatch.setattr(dispatch, "_told", set())
    yield
    dispatch.distrusted.clear()


@pytest.mark.parametrize("most", [whole.MOST, 100])
def test_every_kernel_passes_its_trial(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "MOST", most)
    assert trial.try_kernels(torch.device(DEVICE), SIDE) == {}


BROKEN = "it fails on this device (RuntimeError: no such instruction)"


def test_a_kernel_that_is_wrong_or_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from medkernels.region_dice import fused as dice
    from medkernels.upsample_add import fused

    real = fused.upsample_add
    monkeypatch.setattr(fused, "upsample_add", lambda x, skip: real(x, skip) * 1.001)

    def broken(*arguments: object) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(dice, "region_dice", broken)
    with caplog.at_level(logging.WARNING, "medkernels"):
        found = trial.try_kernels(torch.device(DEVICE), SIDE)
    assert found == {
        "upsample_add": "it is off by 0.1% on this device", "region_dice": BROKEN
    }  # fmt: skip
    assert sorted(record.message for record in caplog.records) == [
        f"region_dice: reference instead of fused: {BROKEN}",
        "upsample_add: reference instead of fused: it is off by 0.1% on this device",
    ]
    x, skip = torch.randn(1, 1, 1, 1, 1, device=DEVICE), torch.randn(1, 1, 2, 2, 2, device=DEVICE)
    assert not dispatch.use_fused("upsample_add", "auto", [x])
    with pytest.raises(dispatch.FusedUnavailable, match="off by"):
        upsample_add.upsample_add(x, skip, impl="fused")


def test_a_device_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(trial, "TRIALS", {"k": lambda device, side, impl: iter(calls.append(impl) or [])})
    for _ in range(2):
        trial.try_kernels(torch.device(DEVICE), SIDE)
    assert calls == ["reference", "fused"]
    trial.try_kernels(torch.device("meta"), SIDE)  # no kernel runs there
    assert calls == ["reference", "fused"]


def test_every_kernel_has_a_trial() -> None:
    folders = {path.parent.name for path in (Path(__file__).parents[2] / "kernels").glob("*/fused.py")}
    assert folders | {"instance_norm_leaky_relu"} == set(trial.TRIALS)
