"""Volumes that stay on the device give the batches of the DALI pipeline, and are chosen where they fit."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch_helpers import run_main

from medseg import resident
from medseg.augment import Augment
from medseg.cache import Cache
from medseg.pipeline import VolumeLoader
from medseg.recipes import SegRecipe
from medseg.resident import ResidentLoader, bytes_of, stays
from medseg.task import SegTask
from medtrain.sampling import Stream

CPU = torch.device("cpu")
Tiny = Callable[..., SegRecipe]


def loader(recipe: SegRecipe, cache: Path, first_step: int = 0, device: torch.device = CPU) -> Iterator[Any]:
    task = SegTask(recipe, Cache(cache))
    stream = Stream(recipe.train.seed, task.epoch_length(), recipe.train.batch, first_step=first_step)
    return task.loader(stream, device)


DEVICES = [CPU, pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("crop", ["32,32,32", "64,72,32"], ids=["cases", "small cases"])
@pytest.mark.parametrize("settings", [(), ("augment.rotate=1", "augment.zoom=1")], ids=["flips", "warps"])
def test_the_batches_are_those_of_dali(
    settings: tuple[str, ...], crop: str, device: torch.device, cache: Path, tiny: Tiny
) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    recipe = tiny("train.batch=2", "data.foreground=0.5", f"data.crop={crop}", *settings)
    ours = loader(recipe.override(["data.resident=on"]), cache, 1, device)
    theirs = loader(recipe.override(["data.resident=off"]), cache, 1, device)
    assert isinstance(ours, ResidentLoader)
    assert isinstance(theirs, VolumeLoader)
    assert ours.volumes.image.device.type == device.type
    for _ in range(4):
        a, b = next(ours), next(theirs)
        assert torch.equal(a.key_B2, b.key_B2)
        assert a.image_BCDHW.dtype == b.image_BCDHW.dtype
        assert a.label_BDHW.dtype == b.label_BDHW.dtype
        # the workers hand float16 on after a warp; a nearest voxel may be the other one at a border
        torch.testing.assert_close(a.image_BCDHW, b.image_BCDHW, rtol=0, atol=1e-2)
        assert (a.label_BDHW != b.label_BDHW).float().mean() < 2e-3
        if not settings:
            assert torch.equal(a.label_BDHW, b.label_BDHW)


def test_a_run_on_them_goes_on_where_it_ended(cache: Path, tiny: Tiny) -> None:
    recipe = tiny("train.batch=2", "data.resident=on")
    whole, late = loader(recipe, cache), loader(recipe, cache, 3)
    for _ in range(3):
        next(whole)
    a, b = next(whole), next(late)
    assert torch.equal(a.key_B2, b.key_B2)
    assert torch.equal(a.image_BCDHW, b.image_BCDHW)


def test_training_on_them(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ("data.crop=32,32,32", "data.spacing_mm=0", "train.epochs=1", "train.precision=fp32", "data.resident=on")
    words = [part for item in sets for part in ("--set", item)]
    assert run_main("train", "brats_segresnet_demo", "--cache", cache, "--out", tmp_path / "run", *words) == 0
    assert "training volumes stay on the CPU (" in capsys.readouterr().out


def test_what_they_take(cache: Path) -> None:
    opened = Cache(cache)
    cases = opened.ids[:2]
    arrays = [opened.read(case, name) for case in cases for name in ("image", "label")]
    assert bytes_of(opened, cases) == sum(array.nbytes for array in arrays)


def test_they_stay_where_a_gpu_has_room(cache: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, gpu = Cache(cache), torch.device("cuda", 0)
    size = bytes_of(opened, opened.ids)
    for free, there in ((int(size / resident.SHARE) + 1, True), (int(size / resident.SHARE) - 4, False)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, free=free: (free, 10 * free))
        assert stays(tiny(), opened, opened.ids, gpu) == there
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (10**15, 10**15))
    assert not stays(tiny(), opened, opened.ids, CPU)
    assert not stays(tiny("data.resident=off"), opened, opened.ids, gpu)
    assert not stays(tiny("augment.noise=0.1"), opened, opened.ids, gpu)


def test_what_one_gather_can_not_do_is_refused(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ("data.crop=32,32,32", "data.spacing_mm=0", "data.resident=on", "augment.noise=0.1", "augment.blur=0.1")
    words = [part for item in sets for part in ("--set", item)]
    assert run_main("train", "brats_segresnet_demo", "--cache", cache, "--out", tmp_path / "run", *words) == 2
    error = capsys.readouterr().err
    assert "data.resident=on can not blur, noise (augment): --set data.resident=off" in error


def test_every_operation_is_known() -> None:
    chances = ("rotate", "zoom", "noise", "blur", "contrast", "low_resolution", "gamma")
    assert set(Augment(**dict.fromkeys(chances, 1.0)).operations) > resident.GATHERED
    assert np.all([name in Augment(rotate=1.0).operations for name in resident.GATHERED])
