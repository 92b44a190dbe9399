"""The recipes: each function returns a whole run as a value. Imports no torch, the login node only plans."""

from dataclasses import dataclass, field, replace
from typing import Literal

from medseg.augment import Augment
from medtrain.recipe import NO_EFFECT, Optim, Recipe, Train, within


@dataclass(frozen=True, kw_only=True)
class VolumeData:
    """Which cases and crops; `crop` in voxels of the cache, zero around a case that is smaller.

    `foreground` is the share of crops that hold a tumour voxel. With `verify` the bytes of every case are compared with
    its checksum when it is first read. `holdout` names the validation cases outright; with `val_fraction` 0 and no
    hold-out there is no validation, and the newest weights are kept. `resident` keeps all training volumes on the
    device; `auto` does where a GPU has room and the augmentation is crops, flips, rotation, zoom and intensity.
    """

    crop: tuple[int, int, int] = within((128, 128, 128), 1, most=4096)
    spacing_mm: float = within(0.0, 0)  # that the cache must have; 0: the scans' own
    foreground: float = within(0.0, 0)
    crops_per_case: int = within(1, 1)
    split_seed: int = 0
    fold: int = within(0, 0)
    folds: int = within(0, 0)
    val_fraction: float = within(0.2, 0, below=1)
    test_fraction: float = within(0.0, 0, below=1)
    holdout: tuple[str, ...] = ()
    verify: bool = field(default=False, metadata=NO_EFFECT)
    resident: Literal["auto", "on", "off"] = field(default="auto", metadata=NO_EFFECT)


@dataclass(frozen=True, kw_only=True)
class SegModel:
    """One of MONAI's networks, 4 channels in, 3 region logits out. Fields of other networks are refused, if set.

    SegResNet: `filters`, `blocks_down`, `blocks_up`, `dropout`. UNETR: `feature`, `hidden`, `mlp`, `heads`, `dropout`.
    SwinUNETR: `feature` (in twelves), `dropout`. DynUNet, the plain U-Net of nnU-Net: `filters` (of the first level,
    doubled at each up to 320), `levels`, `supervised` (deep supervision at so many coarser levels).
    `kernels`: fused GPU kernels, plain torch, or the first where they run (`auto`). Weights serve all three.
    """

    name: Literal["segresnet", "unetr", "swinunetr", "dynunet"] = "segresnet"
    filters: int = within(16, 8, most=1024)  # group normalisation has 8 groups
    blocks_down: tuple[int, ...] = within((1, 2, 2, 4), 1, most=64)
    blocks_up: tuple[int, ...] = within((1, 1, 1), 1, most=64)
    dropout: float = within(0.2, 0, below=1)
    feature: int = within(16, 1, most=1024)
    hidden: int = within(768, 1, most=16384)
    mlp: int = within(3072, 1, most=65536)
    heads: int = within(12, 1, most=1024)
    levels: int = within(6, 2, most=8)
    supervised: int = within(3, 0, most=8)
    kernels: Literal["auto", "reference", "fused"] = field(default="auto", metadata=NO_EFFECT)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Sliding window: `window` (0,0,0) takes the crop size. `flips` averages over flips of `flip_axes` at the end."""

    window: tuple[int, int, int] = within((0, 0, 0), 0, most=4096)
    overlap: float = within(0.5, 0, below=1)
    batch: int = within(2, 1, most=65536, **NO_EFFECT)
    flips: bool = False
    flip_axes: tuple[int, ...] = within((0, 1, 2), 0, most=2)


@dataclass(frozen=True, kw_only=True)
class SegRecipe(Recipe):
    """A segmentation run. `loss` is soft Dice with squared denominator, alone or with binary cross-entropy."""

    task: str = "brats"
    data: VolumeData = VolumeData()
    model: SegModel = SegModel()
    augment: Augment = field(default_factory=Augment)
    loss: Literal["dice", "dice_bce"] = "dice"
    evaluate: Evaluate = Evaluate()


def window_of(recipe: SegRecipe) -> tuple[int, int, int]:
    """The sliding window: the recipe's own, or the training crop."""
    return recipe.evaluate.window if any(recipe.evaluate.window) else recipe.data.crop


def brats_segresnet() -> SegRecipe:
    """SegResNet after Myronenko 2018: soft Dice, Adam 1e-4, poly 0.9 by epoch, 300 epochs, flips, intensity.

    The network is that of MONAI's BraTS tutorial, which has crops of 224x224x144 and batch 1, here 128^3 and 2, and
    rotations besides; the paper has 32 filters, 160x192x128 crops, batch 1 and an autoencoder branch.

    Hardware: one GPU of 12 GB or more (a plan counts 6 GB). Time and score on the 484 cases: not measured.
    """
    return SegRecipe(
        name="brats_segresnet",
        augment=Augment(rotate=0.2),
        train=Train(epochs=300, batch=2, validate_every=5, workers=4),
    )


def brats_unetr() -> SegRecipe:
    """UNETR (feature 16, hidden 768) under the same recipe as `brats_segresnet`.

    Hardware: one GPU of 12 GB or more (a plan counts 6 GB). Time and score on the 484 cases: not measured.
    """
    return replace(brats_segresnet(), name="brats_unetr", model=SegModel(name="unetr", dropout=0.0))


def brats_unetr_zero2() -> SegRecipe:
    """`brats_unetr` on eight GPUs, a crop on each, which share optimiser and gradients out by DeepSpeed's ZeRO-2.

    Hardware: 8 GPUs of 16 GB or more. Time and score on the 484 cases: not measured.
    """
    unetr = brats_unetr()
    train = replace(unetr.train, batch=8, strategy="deepspeed", zero=2)
    return replace(unetr, name="brats_unetr_zero2", train=train)


def brats_swinunetr() -> SegRecipe:
    """SwinUNETR (Hatamizadeh 2022, feature 48) under the same recipe as `brats_segresnet`.

    Hardware: one GPU of 40 GB or more (a plan counts 25 GB). Time and score on the 484 cases: not measured.
    """
    return replace(brats_segresnet(), name="brats_swinunetr", model=SegModel(name="swinunetr", feature=48, dropout=0.0))


def brats_dynunet() -> SegRecipe:
    """The plain U-Net of nnU-Net (Isensee 2021), 32 to 320 filters, deep supervision, Dice + BCE, SGD 0.01, poly.

    Hardware: one GPU of 12 GB or more (a plan counts 6 GB). Time and score on the 484 cases: not measured.
    """
    return replace(
        brats_segresnet(),
        name="brats_dynunet",
        model=SegModel(name="dynunet", filters=32, dropout=0.0),
        loss="dice_bce",
        optim=Optim(name="sgd", lr=1e-2, weight_decay=3e-5, schedule="poly", clip_norm=12.0),
    )


def brats_segresnet_2mm() -> SegRecipe:
    """A useful SegResNet without a GPU: 2 mm, 64^3 crops, bf16 on the CPU, 20 minutes on 2 cores.

    For few cases: Dice + BCE, tumour-biased crops, the fuller augmentation, averaged weights, flips at the end. It
    trains on all cases unless `data.holdout` or `data.val_fraction` is set. Needs a cache of 2 mm.
    Scores: docs/results.md.
    """
    return SegRecipe(
        name="brats_segresnet_2mm",
        data=VolumeData(crop=(64, 64, 64), spacing_mm=2.0, foreground=0.5, crops_per_case=8, val_fraction=0.0),
        augment=Augment(
            shift=0.2, scale=0.2, rotate=0.3, degrees=25.0, zoom=0.2, noise=0.1, blur=0.1, contrast=0.2,
            low_resolution=0.1, gamma=0.2,
        ),
        loss="dice_bce",
        optim=Optim(name="adamw", lr=1e-3, weight_decay=1e-4, schedule="cosine", warmup_steps=50, clip_norm=1.0,
                    ema=0.99),
        train=Train(epochs=26, batch=1, validate_every=1000, workers=1),
        evaluate=Evaluate(flips=True),
    )  # fmt: skip


def brats_segresnet_demo() -> SegRecipe:
    """SegResNet on the 2 mm phantoms at 3 mm, some minutes on 2 cores; scores on held-out phantoms: README.

    The crop holds most of a head: group normalisation needs to see tissue around a tumour that fills a small crop.
    Batches are of two, as torch convolves small float32 volumes one by one in a slower way on a CPU.
    """
    return SegRecipe(
        name="brats_segresnet_demo",
        data=VolumeData(crop=(48, 64, 48), spacing_mm=3.0, foreground=0.5, crops_per_case=2),
        model=SegModel(filters=8),
        loss="dice_bce",
        optim=Optim(name="adamw", lr=4e-3, weight_decay=1e-4, schedule="cosine", warmup_steps=20, clip_norm=1.0,
                    ema=0.98),
        train=Train(epochs=16, batch=2, validate_every=4, workers=1),
    )  # fmt: skip


def brats_unetr_demo() -> SegRecipe:
    """A small UNETR on the 2 mm phantoms, a few minutes on 2 cores; scores: README."""
    demo = brats_segresnet_demo()
    return replace(
        demo,
        name="brats_unetr_demo",
        model=SegModel(name="unetr", feature=8, hidden=192, mlp=384, heads=6, dropout=0.0),
        optim=replace(demo.optim, lr=2e-3),
    )


def brats_swinunetr_demo() -> SegRecipe:
    """A small SwinUNETR on the 2 mm phantoms; scores: not measured."""
    demo = brats_segresnet_demo()
    return replace(
        demo,
        name="brats_swinunetr_demo",
        data=replace(demo.data, crop=(32, 64, 32)),
        model=SegModel(name="swinunetr", feature=12, dropout=0.0),
        optim=replace(demo.optim, lr=1e-3),
    )


def brats_dynunet_demo() -> SegRecipe:
    """A small plain U-Net on the 2 mm phantoms; scores: not measured."""
    demo = brats_segresnet_demo()
    model = SegModel(name="dynunet", filters=8, levels=4, supervised=2, dropout=0.0)
    return replace(demo, name="brats_dynunet_demo", model=model, optim=replace(demo.optim, lr=2e-3))


RECIPES = {
    maker.__name__: maker
    for maker in (
        brats_segresnet, brats_unetr, brats_unetr_zero2, brats_swinunetr, brats_dynunet, brats_segresnet_2mm,
        brats_segresnet_demo, brats_unetr_demo, brats_swinunetr_demo, brats_dynunet_demo,
    )
}  # fmt: skip
SWEEPS = {
    "brats_four": ("brats_segresnet", "brats_unetr", "brats_swinunetr", "brats_dynunet"),
    "brats_four_demo": ("brats_segresnet_demo", "brats_unetr_demo", "brats_swinunetr_demo", "brats_dynunet_demo"),
    "brats": ("brats_segresnet", "brats_unetr"),
    "brats_demo": ("brats_segresnet_demo", "brats_unetr_demo"),
}
