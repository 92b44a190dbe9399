"""What goes wrong inside a run ends it with one sentence: bad voxels, unreadable images, no memory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from launch_helpers import run_main

from medcls.cache import ImageCache
from medcls.recipes import ClsRecipe
from medlaunch.run import run
from medseg.recipes import SegRecipe
from medtrain import checkpoint, divergence
from medtrain.engine import Engine
from medtrain.errors import Failed, UserError

Tiny = Callable[..., SegRecipe]
TinyImages = Callable[..., ClsRecipe]


@pytest.fixture
def poisoned(cache: Path, tiny: Tiny, tmp_path: Path) -> tuple[Path, str]:
    """A cache with one training case whose voxels are all infinite, and that case."""
    copy = tmp_path / "poisoned.h5"
    shutil.copy(cache, copy)
    run_folder = tmp_path / "look"
    run(tiny(), cache, run_folder)
    case = json.loads((run_folder / "split.json").read_text())["train"][0]
    with h5py.File(copy, "r+") as file:
        file[f"cases/{case}/image"][...] = np.inf
    return copy, case


def test_steps_with_bad_voxels_are_skipped_and_counted(poisoned: tuple[Path, str], tiny: Tiny, tmp_path: Path) -> None:
    path, _ = poisoned
    out = tmp_path / "run"
    done = run(tiny("train.epochs=2", "train.log_every=1", "train.batch=1"), path, out)
    assert done["status"] == "done"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["train/skipped"] for line in lines if "train/skipped" in line]
    assert 0 < sum(skipped) < len(skipped)  # one of four cases
    weights = checkpoint.load(out / checkpoint.LAST)["model"]
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_too_many_in_a_row_end_the_run_and_can_be_replayed(
    poisoned: tuple[Path, str], tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, case = poisoned
    out = tmp_path / "run"
    recipe = tiny("train.max_skipped=1", "train.save_every_s=0", "train.log_every=1", "train.epochs=2")
    with pytest.raises(Failed, match=r"not finite: lower optim\.lr"):
        run(recipe, path, out)
    told = json.loads((out / divergence.RECORD).read_text())
    assert case in [sample["case"] for sample in told["samples"]]
    assert len(told["samples"]) == recipe.train.batch
    assert told["command"] == f"python launch/replay.py {out}"
    if told["step"]:
        kept = checkpoint.load(out / checkpoint.LAST)
        assert kept["step"] <= told["step"]  # nothing of the lost step
    weights = checkpoint.load(out / divergence.WEIGHTS)["model"]
    assert all(torch.isfinite(value).all() for value in weights.values())
    capsys.readouterr()
    assert run_main("replay", out) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "epoch" not in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    shown = {(int(c[0]), int(c[1])): c for c in cells if c[0].isdigit()}
    assert set(shown) == {(sample["epoch"], sample["index"]) for sample in told["samples"]}
    for row in shown.values():
        assert (int(row[3]) > 0) == (row[2] == case)


def test_there_is_nothing_to_replay(
    cache: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny(), cache, tmp_path / "run")
    assert run_main("replay", tmp_path / "run") == 2
    assert "diverged.json is not there" in capsys.readouterr().err


def test_a_diverging_learning_rate_ends_the_run(cache: Path, tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny(
        "train.epochs=9",
        "train.log_every=1",
        "optim.lr=1e15",
        "optim.clip_norm=0",
        "optim.weight_decay=1e15",
        "train.validate_every=100",
    )
    with pytest.raises(Failed, match=r"gradients of 10 steps, \d+ to \d+, were not finite"):
        run(recipe, cache, tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(workers: int, image_cache: Path, tiny_images: TinyImages, tmp_path: Path) -> None:
    copy = tmp_path / "images.h5"
    shutil.copy(image_cache, copy)
    recipe = tiny_images(f"train.workers={workers}", "augment.mixup=0")
    run(recipe.override(["train.epochs=1"]), image_cache, tmp_path / "look")
    victim = json.loads((tmp_path / "look" / "split.json").read_text())["train"][0]
    with h5py.File(copy, "r+") as file:
        index = ImageCache(image_cache).ids.index(victim)
        start, end = file["offsets"][index : index + 2]
        scan = file["bytes"][start:end].tobytes().index(b"\xff\xda")  # what stands before tells the size
        file["bytes"][start + scan : end] = 0
    with pytest.raises(Failed, match="can not be loaded") as caught:
        run(recipe, copy, tmp_path / "run")
    assert f"case {victim} " in str(caught.value)
    assert len(str(caught.value)) < 400


def test_no_memory(cache: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "train_step", lambda self, *rest: torch.empty(10**15))
    with pytest.raises(UserError, match=r"memory of the host is full: lower train\.batch or data\.crop"):
        run(tiny(), cache, tmp_path / "run")


@pytest.mark.parametrize("what", ["optimizer", "ema", "scores", "a weight", "a shape", "signature"])
def test_a_checkpoint_that_lacks_something_is_not_gone_on_from(
    what: str, cache: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe = tmp_path / "run", tiny("optim.ema=0.9")
    run(recipe, cache, out)
    (out / "done.json").unlink()
    content = checkpoint.load(out / checkpoint.LAST)
    name = next(iter(content["model"]))
    if what == "a weight":
        del content["model"][name]
    elif what == "a shape":
        content["model"][name] = torch.zeros(1, 2)
    else:
        del content[what]
    checkpoint.save(out / checkpoint.LAST, content)
    with pytest.raises(UserError, match=r"checkpoint_last\.pt is (damaged or )?of another") as caught:
        run(recipe, cache, out)
    assert "\n" not in str(caught.value)
