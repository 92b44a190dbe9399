"""The recipes of cancer classification: each function returns a whole run as a value. Imports no torch."""

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from medcls.augment import Augment
from medtrain.recipe import NO_EFFECT, Optim, Recipe, Train, place, within

ALL_CANCERS = "every"  # not "all": ALL is a leukaemia and one of the cancers
Network = Literal["densenet201", "mobilenetv3_small_100", "resnetv2_50", "vgg19"]


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Which images, how they are split, and the side in pixels that they are resized to.

    `cancer` names one of the data set's, "every" takes all their classes at once, "" the only one there is. `split`
    "group" keeps near-duplicates on one side, "random" is the published way. With `folds` the test part is fold `fold`
    of so many. `balance` "loss" weighs a class by the inverse of its share of the training images. `positive` names the
    class of two whose recall and precision are told ("": see `choose_positive`); it changes tables alone. With `verify`
    the bytes of every image are compared with its checksum when it is first read.
    """

    cancer: str = ""
    size: int = within(224, 32, most=4096)
    split: Literal["group", "random"] = "group"
    split_seed: int = 0
    fold: int = within(0, 0)
    folds: int = within(0, 0)
    val_fraction: float = within(0.15, 0.01, below=1)  # chooses the checkpoint and weighs the ensemble
    test_fraction: float = within(0.15, 0.01, below=1)
    balance: Literal["none", "loss"] = "none"
    positive: str = field(default="", metadata=NO_EFFECT)  # scores are made again from the rows
    verify: bool = field(default=False, metadata=NO_EFFECT)


@dataclass(frozen=True, kw_only=True)
class ClsModel:
    """A timm network. `weights`: imagenet, none, or a file; imagenet is looked for in `weights_folder`, which is
    $MEDTRAIN_WEIGHTS or ~/.cache/medtrain/weights where it is empty (see `launch/prepare.py weights`).
    """

    name: Network = "densenet201"
    weights: str = place("imagenet", "imagenet", "none")
    weights_folder: str = place("", **NO_EFFECT)
    dropout: float = within(0.0, 0, below=1)
    mlp_ratio: float = within(1.0, 0.01, most=16)  # width of VGG19's hidden layer before the classifier, times 4096


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """`freeze_epochs`: the head alone is trained so long. `layer_decay`: the learning rate of a layer is this factor
    times that of the layer after it, from the head backwards (1: the same for all).
    """

    freeze_epochs: int = within(0, 0)
    layer_decay: float = within(1.0, 0.1, most=1)


@dataclass(frozen=True, kw_only=True)
class ClsEvaluate:
    """`flips` averages the final predictions over the eight flips and quarter turns."""

    batch: int = within(32, 1, most=65536, **NO_EFFECT)
    flips: bool = False


@dataclass(frozen=True, kw_only=True)
class ClsRecipe(Recipe):
    """A classification run; the loss is cross-entropy with label `smoothing`, balanced where `data.balance` says so."""

    task: str = "multicancer"
    data: ImageData = ImageData()
    model: ClsModel = ClsModel()
    augment: Augment = field(default_factory=Augment)
    finetune: FineTune = FineTune()
    smoothing: float = within(0.0, 0, below=1)
    evaluate: ClsEvaluate = ClsEvaluate()

    @property
    def unfreezes_later(self) -> bool:
        return self.finetune.freeze_epochs > 0


def slug(cancer: str) -> str:
    """A cancer's name as a folder name."""
    return re.sub(r"[\W_]+", "_", cancer.lower()).strip("_") or "images"


def multicancer_densenet201() -> ClsRecipe:
    """Ours: AdamW, warm-up and cosine, label smoothing, mixup, averaged weights; 224 pixels, 20 epochs.

    Hardware: one GPU. Time and score on the published set: not measured.
    """
    return ClsRecipe(
        name="multicancer_densenet201",
        augment=Augment(scale=(0.5, 1.0), turn=0.5, angle=0.3, brightness=0.2, contrast=0.2, saturation=0.2, mixup=0.2),
        optim=Optim(name="adamw", lr=1e-3, weight_decay=0.02, schedule="cosine", warmup_steps=100, clip_norm=1.0,
                    ema=0.998),
        smoothing=0.1,
        train=Train(epochs=20, batch=64, workers=4),
    )  # fmt: skip


def multicancer_mobilenetv3() -> ClsRecipe:
    """MobileNetV3-Small under the recipe of `multicancer_densenet201`."""
    return _with(multicancer_densenet201(), "multicancer_mobilenetv3", "mobilenetv3_small_100")


def multicancer_resnetv2() -> ClsRecipe:
    """ResNet50-V2 under the recipe of `multicancer_densenet201`."""
    return _with(multicancer_densenet201(), "multicancer_resnetv2", "resnetv2_50")


def multicancer_vgg19() -> ClsRecipe:
    """VGG19 under the recipe of `multicancer_densenet201`, at a third of its learning rate: it has no normalisation."""
    ours = multicancer_densenet201()
    return _with(replace(ours, optim=replace(ours.optim, lr=3e-4)), "multicancer_vgg19", "vgg19")


def multicancer_all() -> ClsRecipe:
    """One DenseNet-201 for every class of every cancer (26 in the published set), under our recipe."""
    ours = multicancer_densenet201()
    return replace(ours, name="multicancer_all", data=replace(ours.data, cancer=ALL_CANCERS))


def published_densenet201() -> ClsRecipe:
    """As published: Adam 0.01 over everything, ReduceLROnPlateau on validation accuracy (factor 0.5, patience 5, least
    rate 1e-3), no augmentation but what the data set was enlarged by.
    """
    return ClsRecipe(
        name="published_densenet201",
        augment=Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0),
        optim=Optim(name="adam", lr=0.01, weight_decay=0.0, schedule="plateau", min_lr=1e-3),
        train=Train(epochs=20, batch=32, workers=4),
    )


def published_mobilenetv3() -> ClsRecipe:
    """MobileNetV3-Small under the published recipe."""
    return _with(published_densenet201(), "published_mobilenetv3", "mobilenetv3_small_100")


def published_resnetv2() -> ClsRecipe:
    """ResNet50-V2 under the published recipe."""
    return _with(published_densenet201(), "published_resnetv2", "resnetv2_50")


def published_vgg19() -> ClsRecipe:
    """VGG19 under the published recipe."""
    return _with(published_densenet201(), "published_vgg19", "vgg19")


def multicancer_densenet201_demo() -> ClsRecipe:
    """DenseNet-201 from scratch on 64-pixel phantoms, a minute or two on 2 cores; scores: README."""
    return _demo(multicancer_densenet201(), lr=2e-3, epochs=5)


def multicancer_mobilenetv3_demo() -> ClsRecipe:
    """MobileNetV3-Small from scratch on 64-pixel phantoms; scores: README."""
    return _demo(multicancer_mobilenetv3(), lr=2e-3, epochs=10)


def multicancer_resnetv2_demo() -> ClsRecipe:
    """ResNet50-V2 from scratch on 64-pixel phantoms; scores: README."""
    return _demo(multicancer_resnetv2(), lr=2e-3)


def multicancer_vgg19_demo() -> ClsRecipe:
    """VGG19 with a narrow head, from scratch on 64-pixel phantoms; scores: README."""
    demo = _demo(multicancer_vgg19(), lr=1e-4)
    return replace(demo, model=replace(demo.model, mlp_ratio=0.125))


def _with(recipe: ClsRecipe, name: str, network: Network) -> ClsRecipe:
    return replace(recipe, name=name, model=replace(recipe.model, name=network))


def _demo(recipe: ClsRecipe, lr: float, epochs: int = 6) -> ClsRecipe:
    return replace(
        recipe,
        name=f"{recipe.name}_demo",
        data=replace(recipe.data, size=64),
        model=replace(recipe.model, weights="none"),
        augment=Augment(scale=(0.9, 1.0), flip_axes=(1,)),
        optim=replace(recipe.optim, lr=lr, warmup_steps=10, ema=0.95),
        train=replace(recipe.train, epochs=epochs, batch=16, workers=1, validate_every=2),
    )


RECIPES = {
    maker.__name__: maker
    for maker in (
        multicancer_densenet201, multicancer_mobilenetv3, multicancer_resnetv2, multicancer_vgg19, multicancer_all,
        published_densenet201, published_mobilenetv3, published_resnetv2, published_vgg19,
        multicancer_densenet201_demo, multicancer_mobilenetv3_demo, multicancer_resnetv2_demo, multicancer_vgg19_demo,
    )
}  # fmt: skip
_NETWORKS = ("densenet201", "mobilenetv3", "resnetv2", "vgg19")
SWEEPS = {
    "multicancer": tuple(f"multicancer_{name}" for name in _NETWORKS),
    "multicancer_published": tuple(f"published_{name}" for name in _NETWORKS),
    "multicancer_demo": tuple(f"multicancer_{name}_demo" for name in _NETWORKS),
}
