"""Training: resumes bit by bit, is the same on two ranks, learns, keeps the best, and leaves a whole run folder."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from launch_helpers import run_main, run_script
from monai.networks.nets import SegResNet

from medlaunch.run import run
from medseg.cache import Cache
from medseg.metrics import DICE, HD95
from medseg.phantom import write_dataset
from medseg.preparation import Preparation, prepare_dataset
from medseg.recipes import RECIPES, SegRecipe
from medseg.task import SegTask
from medtrain import checkpoint
from medtrain.distributed import Ranks
from medtrain.engine import Engine
from medtrain.errors import Stopped, UserError
from medtrain.results import read_rows

Tiny = Callable[..., SegRecipe]


def weights(folder: Path, name: str = checkpoint.LAST) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / name)["model"]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=atol)


def test_a_run_folder_is_whole(cache: Path, tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run(tiny(), cache, out)
    names = {path.name for path in out.iterdir()}
    assert {"recipe.json", "split.json", "cases.csv", "done.json", "metrics.jsonl", "tensorboard", checkpoint.LAST,
            checkpoint.BEST} <= names  # fmt: skip
    assert json.loads((out / "done.json").read_text()) == done
    assert done["label_map"] == "msd"
    rows = read_rows(out / "cases.csv")
    split = json.loads((out / "split.json").read_text())
    assert [row.case for row in rows] == split["val"]
    assert not set(split["train"]) & set(split["val"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keys = {key for line in lines for key in line}
    assert {"train/loss", "train/lr", "speed/samples_per_s", "speed/data_wait_share", "memory/peak_gb", "val/mean",
            "val/TC", "val/WT", "val/ET"} <= keys  # fmt: skip


def test_tensorboard_shows_curves_pictures_recipe_and_hparams(cache: Path, tiny: Tiny, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny("train.log_every=1")
    run(recipe, cache, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "speed/samples_per_s", "speed/data_wait_share", "memory/peak_gb", "val/TC",
            "val/WT", "val/ET", "val/mean", "final/mean"} <= set(tags["scalars"])  # fmt: skip
    assert tags["images"] == ["val/picture"]
    assert any(tag.startswith("recipe") for tag in tags["tensors"])
    assert any("hparams" in key for key in events.summary_metadata)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in logged if "train/loss" in line]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses, abs=1e-6)


def test_best_checkpoint_loads_into_plain_monai_and_carries_its_label_map(
    cache: Path, tiny: Tiny, tmp_path: Path
) -> None:
    run(tiny("optim.ema=0.9"), cache, tmp_path / "run")
    content = checkpoint.load(tmp_path / "run" / checkpoint.BEST)
    plain = SegResNet(init_filters=8, in_channels=4, out_channels=3, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1))
    plain.load_state_dict(content["model"], strict=True)
    assert content["label_map"] == {"name": "msd", "edema": 1, "core": 2, "enhancing": 3}
    assert SegRecipe.from_json(content["recipe"]) == tiny("optim.ema=0.9")


def test_an_interrupted_run_ends_with_the_same_weights(
    cache: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny("model.dropout=0.2", "optim.ema=0.9", "train.save_every_s=0", "train.epochs=2")
    run(recipe, cache, tmp_path / "whole")
    real_step = Engine.train_step

    def dies(self: Engine, *arguments: object) -> torch.Tensor:
        if self.step == 5:
            raise RuntimeError("power cut")
        return real_step(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "train_step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        run(recipe, cache, tmp_path / "broken")
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "broken" / checkpoint.LAST)["step"] == 5
    assert not (tmp_path / "broken" / "done.json").exists()
    run(recipe, cache, tmp_path / "broken")
    for name in (checkpoint.LAST, checkpoint.BEST):
        assert_equal(weights(tmp_path / "whole", name), weights(tmp_path / "broken", name))
    assert (tmp_path / "whole" / "cases.csv").read_text() == (tmp_path / "broken" / "cases.csv").read_text()
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_of_equally_good_weights_the_later_are_kept(
    cache: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SegTask, "summary", lambda self, rows: {"mean": 0.5})
    run(tiny("train.epochs=3"), cache, tmp_path / "run")
    assert checkpoint.load(tmp_path / "run" / checkpoint.BEST)["epoch"] == 3


def test_a_run_on_another_split_is_refused(
    cache: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny(), cache, tmp_path / "run")
    (tmp_path / "run" / "done.json").unlink()
    before = json.loads((tmp_path / "run" / "split.json").read_text())["val"]
    monkeypatch.setattr("medtrain.splits.draw_key", lambda seed, name: (name in before, name))  # as another version may
    with pytest.raises(UserError, match="on another split: give another --out"):
        run(tiny(), cache, tmp_path / "run")


def test_accumulation_equals_one_batch(cache: Path, tiny: Tiny, tmp_path: Path) -> None:
    run(tiny("train.batch=2", "train.log_every=1"), cache, tmp_path / "one")
    run(tiny("train.batch=2", "train.accumulate=2"), cache, tmp_path / "two")
    # Adam's first steps divide by tiny second moments, so rounding differences of 1e-7 grow to 1e-4
    assert_equal(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=5e-4)


@pytest.mark.distributed
def test_two_ranks_equal_one_process(cache: Path, tiny: Tiny, tmp_path: Path) -> None:
    """fp32, same global batch, SGD: weights within 1e-5, rows equal; validation cases shared unevenly (3 on 2)."""
    extra = ("optim.name=sgd", "optim.lr=0.01", "train.workers=1", "data.val_fraction=0.6", "train.log_every=1")
    recipe = tiny(*extra)
    run(recipe, cache, tmp_path / "one")
    sets = [part for item in _as_sets(recipe) for part in ("--set", item)]
    done = run_script("train", "brats_segresnet_demo", "--cache", cache, "--out", tmp_path / "two", *sets, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 processes") == 1
    assert_equal(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=1e-5)
    one, two = (read_rows(tmp_path / name / "cases.csv") for name in ("one", "two"))
    assert len(one) == 3
    assert [row.case for row in one] == [row.case for row in two]
    for a, b in zip(one, two, strict=True):
        assert a.scores == pytest.approx(b.scores, abs=2e-3)
    losses = []
    for name in ("one", "two"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["train/loss"] for line in lines if "train/loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def _as_sets(recipe: SegRecipe) -> list[str]:
    from medseg.recipes import RECIPES
    from medtrain.recipe import flat

    plain, made = flat(RECIPES["brats_segresnet_demo"]()), flat(recipe)
    return [
        f"{key}={','.join(map(str, value)) if isinstance(value, tuple) else str(value).lower()}"
        for key, value in made.items() if value != plain[key]
    ]  # fmt: skip


def test_training_learns(cache: Path, tiny: Tiny, tmp_path: Path) -> None:
    run(tiny("train.epochs=8", "train.validate_every=8", "train.log_every=4"), cache, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.1
    assert lines[-1]["val/WT"] > 0.4  # below 0.1 with fresh weights


def test_refusals(cache: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ("train", "brats_segresnet_demo", "--cache", cache, "--set", "data.spacing_mm=0", "--set",
            "data.crop=32,32,32", "--out")  # fmt: skip
    for sets, words in [
        (("train.batch=3", "train.accumulate=2"), "--set train.batch=4"),
        (("train.precision=fp16",), "needs a GPU"),
        (("data.holdout=nobody",), "nobody is not in the data set"),
        (("data.val_fraction=0.95",), "leave 0 for training"),
        (("data.spacing_mm=2",), "--spacing-mm 2"),
        (("data.crop=20,24,24",), "multiples of 8"),
    ]:
        out = tmp_path / "refused"
        assert run_main(*base, out, *(part for item in sets for part in ("--set", item))) == 2, sets
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error
        assert not (out / "done.json").exists()
    assert run_main("train", "brats_segresnt", "--cache", cache, "--out", tmp_path / "x") == 2
    assert "brats_segresnet" in capsys.readouterr().err
    assert run_main("train", "brats_segresnet_demo", "--cache", tmp_path / "no.h5", "--out", tmp_path / "x") == 2
    assert "no.h5 is not there" in capsys.readouterr().err


def test_another_recipes_folder_is_not_overwritten(
    cache: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    sets = [part for item in _as_sets(tiny()) for part in ("--set", item)]
    arguments = ("train", "brats_segresnet_demo", "--cache", cache, "--out", out, *sets)
    assert run_main(*arguments) == 0
    assert "Dice on the original spacing" in capsys.readouterr().out
    assert run_main(*arguments) == 0
    assert "done already" in capsys.readouterr().out
    assert run_main(*arguments, "--set", "train.seed=7") == 2
    assert "another recipe" in capsys.readouterr().err


@pytest.mark.parametrize("at", [1, 7, 12])
def test_a_run_that_is_told_to_stop_saves_at_that_step_and_goes_on(
    cache: Path, tiny: Tiny, tmp_path: Path, at: int
) -> None:
    recipe = tiny("train.epochs=3", "train.batch=2", "train.validate_every=100")
    whole = tmp_path / "whole"
    run(recipe, cache, whole)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) >= at

    out = tmp_path / "stopped"
    with pytest.raises(Stopped, match=f"stopped at step {at} of 12"):
        run(recipe, cache, out, stop)
    assert checkpoint.load(out / checkpoint.LAST)["step"] == at
    assert not (out / "done.json").exists()
    status = json.loads((out / "status.json").read_text())
    assert (status["total"], status["phase"]) == (12, "train")
    run(recipe, cache, out)
    assert_equal(weights(out), weights(whole))
    status = json.loads((out / "status.json").read_text())
    assert (status["step"], status["phase"]) == (12, "evaluate")
    assert set(status["scores"]) == {"mean"}


@pytest.mark.distributed
def test_a_run_goes_on_with_another_number_of_ranks(cache: Path, tiny: Tiny, tmp_path: Path) -> None:
    """fp32, SGD, same global batch: the same samples; losses within 1e-4 and weights within 1e-5 of an unbroken run."""
    recipe = tiny("optim.name=sgd", "optim.lr=0.01", "train.epochs=3", "train.log_every=1", "optim.ema=0.9")
    run(recipe, cache, tmp_path / "whole")
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) >= 5

    with pytest.raises(Stopped):
        run(recipe, cache, tmp_path / "moved", stop)
    sets = [part for item in _as_sets(recipe) for part in ("--set", item)]
    done = run_script("train", "brats_segresnet_demo", "--cache", cache, "--out", tmp_path / "moved", *sets, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "going on from step 5 of 12" in done.stdout
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "moved"), atol=1e-5)
    told = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("whole", "moved")]  # fmt: skip
    losses = [[line["train/loss"] for line in lines if "train/loss" in line] for lines in told]
    assert len(losses[1]) == 12
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize("name", ["swinunetr", "dynunet"])
def test_the_further_networks_train_validate_and_end(name: str, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", cases=3, seed=3, shape=(64, 88, 56), spacing_mm=2.5)
    larger = prepare_dataset(data, tmp_path / "c.h5", Preparation())
    recipe = RECIPES[f"brats_{name}_demo"]().override([
        "data.crop=32,64,32", "data.spacing_mm=0", "train.batch=2", "train.epochs=1", "train.precision=fp32",
        "train.workers=0", "train.log_every=1",
    ])  # fmt: skip
    done = run(recipe, larger, tmp_path / "run")
    assert done["status"] == "done"
    assert set(done["scores"]) == {*DICE, *HD95}
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run", checkpoint.BEST).values())


def test_more_processes_than_samples_are_refused(cache: Path, tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny("train.batch=4096")
    task = SegTask(recipe, Cache(cache))
    with pytest.raises(UserError, match=r"4096 processes for the \d+ samples of an epoch: start fewer, or add cases"):
        Engine(recipe, task, tmp_path, Ranks(0, 4096, 0, torch.device("cpu")))


def test_ranks_that_would_train_in_different_precisions_are_refused(
    cache: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` is fp16 on an older GPU and bf16 on a newer one; averaged, one's gradients would drown the other's."""
    monkeypatch.setattr("medtrain.distributed.gather", lambda value: [value, "fp16"])
    recipe = tiny()
    with pytest.raises(UserError, match=r"would train in fp16, fp32: --set train\.precision=fp32, or take GPUs"):
        Engine(recipe, SegTask(recipe, Cache(cache)), tmp_path / "run", Ranks(0, 1, 0, torch.device("cpu")))
