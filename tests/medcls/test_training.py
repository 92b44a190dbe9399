"""Training on the same engine as segmentation: resume, ranks, freezing, published recipe, plain timm checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launch_helpers import run_script

from medcls import backbones
from medcls.cache import ImageCache
from medcls.metrics import arrays, summarize
from medcls.recipes import RECIPES, ClsRecipe
from medcls.task import ClsTask
from medlaunch.run import run
from medtrain import checkpoint
from medtrain.distributed import Ranks
from medtrain.engine import Engine
from medtrain.results import read_rows

Tiny = Callable[..., ClsRecipe]


def weights(folder: Path, name: str = checkpoint.LAST) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / name)["model"]


def logged(folder: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def test_a_run_folder_is_whole_and_loads_into_plain_timm(image_cache: Path, tiny_images: Tiny, tmp_path: Path) -> None:
    done = run(tiny_images("optim.ema=0.9"), image_cache, tmp_path / "run")
    assert done["cancer"] == "Oral Cancer"
    assert done["split"] == "group"
    assert done["positive"] == "oral_scc"
    assert done["leaked"] == 0
    content = checkpoint.load(tmp_path / "run" / checkpoint.BEST)
    assert content["classes"] == ["oral_normal", "oral_scc"]
    plain = backbones.timm().create_model("mobilenetv3_small_100", num_classes=2)
    plain.load_state_dict(content["model"], strict=True)
    rows = read_rows(tmp_path / "run" / "cases.csv")
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert [row.case for row in rows] == split["val"] + split["test"]
    test = [row for row in rows if row.part == "test"]
    assert done["scores"]["accuracy"] == pytest.approx(summarize(*arrays(test))["accuracy"])
    assert {"auroc", "sensitivity", "specificity"} <= set(done["scores"])
    assert {"val/accuracy", "val/f1_macro", "val/log_loss", "val/auroc", "val/sensitivity", "train/loss"} <= {
        key for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)
    }


def test_tensorboard_shows_a_confusion_matrix(image_cache: Path, tiny_images: Tiny, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tiny_images(), image_cache, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["val/picture"]
    assert "final/accuracy" in events.Tags()["scalars"]


def test_an_interrupted_run_ends_with_the_same_weights(
    image_cache: Path, tiny_images: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_images("train.epochs=2", "train.save_every_s=0", "augment.mixup=0.3", "optim.ema=0.9",
                         "optim.schedule=plateau", "finetune.freeze_epochs=1", "model.dropout=0.2")  # fmt: skip
    run(recipe, image_cache, tmp_path / "whole")
    real_step = Engine.train_step

    def dies(self: Engine, *arguments: object) -> torch.Tensor:
        if self.step == 10:
            raise RuntimeError("power cut")
        return real_step(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "train_step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        run(recipe, image_cache, tmp_path / "broken")
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "broken" / checkpoint.LAST)["step"] == 10
    run(recipe, image_cache, tmp_path / "broken")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert (tmp_path / "whole" / "cases.csv").read_text() == (tmp_path / "broken" / "cases.csv").read_text()


@pytest.mark.distributed
def test_two_ranks_judge_every_image_once_and_train_as_one(image_cache: Path, tmp_path: Path) -> None:
    """VGG19 has no batch statistics, so the weights of two ranks are those of one process."""
    sets = ("data.size=32", "data.cancer=Oral Cancer", "model.mlp_ratio=0.02", "train.batch=8", "train.epochs=1",
            "train.precision=fp32", "train.workers=0", "optim.name=sgd", "optim.lr=0.001", "optim.ema=0",
            "augment.mixup=0.3", "train.log_every=1", "optim.clip_norm=0")  # fmt: skip
    run(RECIPES["multicancer_vgg19_demo"]().override(list(sets)), image_cache, tmp_path / "one")
    arguments = [part for item in sets for part in ("--set", item)]
    done = run_script("train", "multicancer_vgg19_demo", "--cache", image_cache, "--out", tmp_path / "two", *arguments,
                      ranks=2)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_rows(tmp_path / name / "cases.csv") for name in ("one", "two"))
    assert [(row.case, row.part) for row in one] == [(row.case, row.part) for row in two]
    assert len({row.case for row in two}) == len(two)
    assert logged(tmp_path / "one", "train/loss") == pytest.approx(logged(tmp_path / "two", "train/loss"), abs=1e-4)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-5)


@pytest.mark.distributed
def test_freezing_works_under_ddp_and_batch_statistics_agree(
    image_cache: Path, tiny_images: Tiny, tmp_path: Path
) -> None:
    sets = ("data.size=32", "data.cancer=Oral Cancer", "train.batch=4", "train.epochs=2", "train.precision=fp32",
            "train.workers=0", "train.validate_every=1", "finetune.freeze_epochs=1", "optim.ema=0.9")  # fmt: skip
    arguments = [part for item in sets for part in ("--set", item)]
    done = run_script("train", "multicancer_mobilenetv3_demo", "--cache", image_cache, "--out", tmp_path / "run",
                      *arguments, ranks=2)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # rows of both ranks come from the same weights and statistics: those of the saved checkpoint
    task = ClsTask(tiny_images(*sets), ImageCache(image_cache))
    engine = Engine(tiny_images(*sets), task, tmp_path / "run", Ranks(0, 1, 0, torch.device("cpu")))
    engine.load_best()
    again = engine.evaluate(engine.split.test, "test", thorough=True)
    for row, other in zip(again, read_rows(tmp_path / "run" / "cases.csv")[-len(again) :], strict=True):
        assert row.case == other.case
        assert row.scores == pytest.approx(dict(other.scores), abs=1e-4)


def test_a_frozen_backbone_does_not_move(image_cache: Path, tiny_images: Tiny, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fresh = backbones.build_model(tiny_images(), 2).state_dict()
    run(tiny_images("finetune.freeze_epochs=1", "train.epochs=1"), image_cache, tmp_path / "frozen")
    run(tiny_images("finetune.freeze_epochs=1", "train.epochs=2"), image_cache, tmp_path / "released")
    frozen, released = weights(tmp_path / "frozen"), weights(tmp_path / "released")
    heads = ("classifier.",)
    body = [key for key in fresh if not key.startswith(heads)]
    assert all(torch.equal(frozen[key], fresh[key]) for key in body)  # running statistics too
    assert not any(torch.equal(frozen[key], fresh[key]) for key in fresh if key.startswith(heads))
    moved = [key for key in body if not torch.equal(released[key], fresh[key])]
    assert len(moved) > 0.9 * len(body)


def test_the_published_recipe_lowers_its_rate_on_a_plateau(image_cache: Path, tmp_path: Path) -> None:
    sets = ["data.size=32", "data.cancer=Oral Cancer", "model.weights=none", "train.batch=14", "train.epochs=6",
            "optim.patience=0", "train.workers=0", "train.precision=fp32", "train.log_every=1"]  # fmt: skip
    recipe = RECIPES["published_mobilenetv3"]().override(sets)
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.min_lr, recipe.optim.factor) == ("adam", 0.01, 1e-3, 0.5)
    run(recipe, image_cache, tmp_path / "run")
    rates, accuracy = logged(tmp_path / "run", "train/lr"), logged(tmp_path / "run", "val/accuracy")
    assert len(accuracy) == 6
    expected, best, rate = [], -1.0, 0.01
    for value in accuracy:
        expected.append(rate)
        rate = rate if value > best * (1 + 1e-4) or best < 0 else max(1e-3, rate / 2)
        best = max(best, value)
    assert rates[::2] == pytest.approx(expected)
    assert rates[-1] < 0.01


def test_training_learns(image_cache: Path, tiny_images: Tiny, tmp_path: Path) -> None:
    sets = ["data.size=32", "data.cancer=Oral Cancer", "train.batch=8", "train.epochs=20", "train.precision=fp32",
            "train.validate_every=20", "train.log_every=8", "smoothing=0", "augment.flip=0", "augment.scale=1,1",
            "train.workers=0", "augment.ratio=1,1", "augment.angle=0"]  # fmt: skip
    recipe = RECIPES["multicancer_resnetv2_demo"]().override(sets)
    run(recipe, image_cache, tmp_path / "run")
    losses = logged(tmp_path / "run", "train/loss")
    assert losses[-1] < 0.7 * losses[0]


def test_one_classifier_of_every_class(image_cache: Path, tiny_images: Tiny, tmp_path: Path) -> None:
    done = run(tiny_images("data.cancer=every"), image_cache, tmp_path / "run")
    assert done["cancer"] == "every"
    assert len(checkpoint.load(tmp_path / "run" / checkpoint.BEST)["classes"]) == 5
