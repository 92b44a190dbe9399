"""Cancer classification as the engine sees it: model, loss, predictions, score.

Legend of shapes: B batch, H W pixels, K classes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.nn import functional

from medcls import backbones, figures, images, metrics
from medcls.augment import ImageSource, WholeImages
from medcls.cache import ImageCache
from medcls.duplicates import leaked_paths, relatives
from medcls.folders import choose_cancer
from medcls.pipeline import ImageBatch, ImageLoader
from medcls.positive import choose_positive
from medcls.recipes import ClsRecipe
from medcls.selection import make_split, select
from medtrain.cache import check_preparation
from medtrain.errors import UserError
from medtrain.estimate import Example
from medtrain.results import CaseRow
from medtrain.sampling import Stream
from medtrain.splits import Split
from medtrain.strategy import Group

CLASSES = 26  # of the published set, where no data tell


class ClsTask:
    """The task over one cache; raises UserError where recipe and cache do not fit."""

    best_by = "accuracy"

    def __init__(self, recipe: ClsRecipe, cache: ImageCache):
        check_preparation(cache.path, cache.preparation, images.VERSION)
        self.recipe, self.cache = recipe, cache
        cache.verifying = recipe.data.verify  # evaluation reads through it
        self.cancer = choose_cancer(cache, recipe.data.cancer)
        chosen, targets, self.classes = select(cache, self.cancer)
        self.positive = choose_positive(self.classes, recipe.data.positive)
        self._index = {cache.ids[n]: int(n) for n in chosen}
        self._target = {cache.ids[n]: int(target) for n, target in zip(chosen, targets, strict=True)}
        self.split: Split = make_split(cache, recipe.data)
        self.weights = backbones.weights_file(recipe.model)
        self.class_weights_K = self._class_weights() if recipe.data.balance == "loss" else None
        self.mean, self.std = backbones.normalisation(recipe.model.name)

    def build_model(self) -> nn.Module:
        """The recipe's network, the head fresh and the rest as the recipe's weights say."""
        model = backbones.build_model(self.recipe, len(self.classes))
        if self.weights:
            backbones.load_backbone(model, self.recipe.model.name, self.weights)
        return model

    def parameter_groups(self, model: nn.Module) -> list[Group]:
        """Groups by depth, frozen at first if the recipe wants it."""
        return backbones.parameter_groups(model, self.recipe)

    def loss(self, outputs: torch.Tensor, batch: ImageBatch) -> torch.Tensor:
        """Mean cross-entropy with label smoothing; of a mixed image, its own and its partner's by their shares.

        Balanced, class k of the smoothed and mixed target t counts w_k times: the loss of an image is
        -sum_k w_k t_k log p_k. The mean is over images, as torch's for soft targets, and not over their weights: these
        are 1 on average over the training images, and the loss stays the same on any number of ranks.
        """
        target_B = batch.target_B
        if self.class_weights_K is not None:
            self.class_weights_K = self.class_weights_K.to(outputs.device)  # moves once
        own, other = (
            functional.cross_entropy(outputs, target, self.class_weights_K, reduction="none",
                                     label_smoothing=self.recipe.smoothing)
            for target in (target_B, target_B[partners(len(target_B), target_B.device)])
        )  # fmt: skip
        return (batch.mix_B * own + (1 - batch.mix_B) * other).mean()

    def _class_weights(self) -> torch.Tensor:
        """(K,) float32: training images / (classes x those of the class); raises UserError where a class has none."""
        targets = np.array([self._target[case] for case in self.split.train])
        lacking = sorted(set(range(len(self.classes))) - set(targets.tolist()))
        if lacking:  # its files lie under another class, too
            name = self.classes[lacking[0]]
            raise UserError(f"{self.cache.path} has no training image of class {name}: --set data.balance=none.")
        weights = compute_class_weight("balanced", classes=np.arange(len(self.classes)), y=targets)
        return torch.from_numpy(weights).float()

    def predictions(
        self, forward: Callable[[torch.Tensor], torch.Tensor], cases: Sequence[str], *, thorough: bool
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Class probabilities (K,) float64 of whole images, in the order of `cases`."""
        if not cases:
            return
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        recipe, indices = self.recipe, [self._index[case] for case in cases]
        source = WholeImages(len(cases), lambda n: (self.cache.encoded(indices[n]), self.cache.size[indices[n]]),
                             lambda n: cases[n])  # fmt: skip
        loader = ImageLoader(
            source, batch=recipe.evaluate.batch, size=recipe.data.size, operations=(), mean=self.mean, std=self.std,
            workers=0, threads=max(1, recipe.train.workers), device=device,
        )  # fmt: skip
        flips = thorough and recipe.evaluate.flips
        yield from zip(cases, class_probs(forward, loader, len(cases), flips=flips), strict=True)

    def score(self, case: str, prediction: np.ndarray, *, thorough: bool) -> dict[str, float]:
        """Class, prediction and probabilities of an image."""
        return metrics.row_scores(self._target[case], prediction, self.classes)

    def summary(self, rows: Sequence[CaseRow]) -> dict[str, float]:
        """Accuracy, macro F1, log-loss, AUROC; then macro precision and recall, and those of the positive class."""
        scores = metrics.summarize(*metrics.arrays(rows), self.positive)
        first = {name: scores[name] for name in ("accuracy", "f1_macro", "log_loss", "auroc") if name in scores}
        return first | {name: value for name, value in scores.items() if not name.endswith("_weighted")}

    def picture(self, rows: Sequence[CaseRow], case: str, prediction: np.ndarray) -> np.ndarray:
        """The confusion matrix."""
        target, probs = metrics.arrays(rows)
        counts = metrics.confusion(target, probs.argmax(1), len(self.classes))
        return figures.confusion_picture(counts, self.classes)

    def epoch_length(self) -> int:
        """Images of one epoch."""
        return len(self.split.train)

    def loader(self, stream: Stream, device: torch.device) -> Iterator[ImageBatch]:
        """This rank's batches from DALI, mixed."""
        if self.recipe.augment.mixup and stream.micro_batch % 2 and stream.world * stream.accumulate > 1:
            raise UserError(
                f"augment.mixup pairs images, and {stream.micro_batch} of train.batch={stream.batch} fall on each: "
                "--set train.batch so that it is even."
            )
        recipe, cases, in_workers = self.recipe, self.split.train, device.type == "cpu"
        source = ImageSource(
            cache=str(self.cache.path), images=np.array([self._index[case] for case in cases], np.int64),
            targets=np.array([self._target[case] for case in cases], np.int64), augment=recipe.augment, stream=stream,
            size=recipe.data.size if in_workers else 0, verify=recipe.data.verify,
        )  # fmt: skip
        loader = ImageLoader(
            source, batch=stream.micro_batch, size=recipe.data.size, operations=recipe.augment.operations,
            mean=self.mean, std=self.std, decoded=in_workers, workers=recipe.train.workers,
            threads=max(1, recipe.train.workers), device=device,
        )  # fmt: skip
        for batch in (batch.to(device) for batch in loader):
            yield mixed(batch) if recipe.augment.mixup else batch

    def judged(self) -> list[tuple[str, tuple[str, ...]]]:
        """Validation rows are kept too: the ensemble's weights come from them."""
        return [("val", self.split.val), ("test", self.split.test)]

    def leaked(self) -> int:
        """Test images with a near-duplicate among the training images."""
        return len(leaked_paths(self.cache, self.split))

    def about(self) -> dict[str, Any]:
        """What done.json tells beside the scores."""
        name = "" if self.positive is None else self.classes[self.positive]
        return {"cancer": self.cancer, "positive": name, "split": self.recipe.data.split, "leaked": self.leaked(),
                "seen_before": self.seen_before()}  # fmt: skip

    def warnings(self) -> list[str]:
        """What the weights that training starts from have learnt of its test images."""
        seen, count = self.seen_before(), len(self.split.test)
        words = f"{self.weights} was trained or chosen by {seen} of {count} test images or near-duplicates of them"
        return [f"{words}: scores will be too good; take weights of a run of the same split."] if seen else []

    def seen_before(self) -> int:
        """Test images that the weights which training starts from were trained or chosen by, near-duplicates too."""
        return len(relatives(self.cache, self.cache.near, self.learnt_before, self.split.test))

    @cached_property
    def learnt_before(self) -> frozenset[str]:
        """Images that the weights which training starts from were trained or chosen by."""
        return backbones.seen_by(self.weights) if self.weights else frozenset()

    def facts(self) -> dict[str, Any]:
        """What prediction needs beside the weights."""
        return {"classes": list(self.classes), "preparation": self.cache.preparation, "weights": self.origin,
                "seen_before": sorted(self.learnt_before)}  # fmt: skip

    @cached_property
    def origin(self) -> dict[str, str]:
        """The file of weights that training started from; empty for fresh ones."""
        return {"file": self.weights.name, "blake2b": backbones.fingerprint(self.weights)} if self.weights else {}


def partners(count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Index of each image's mixup partner: its neighbour in pairs; the last of an odd batch itself.

    Pairs lie on one rank for every number of ranks that leaves even micro-batches, so the samples stay the same.
    """
    return torch.arange(count, device=device).bitwise_xor(1).clamp(max=count - 1)


def mixed(batch: ImageBatch) -> ImageBatch:
    """x <- mix x + (1 - mix) x[partner] (mixup, Zhang et al. 2018)."""
    share = batch.mix_B[:, None, None, None]
    image = share * batch.image_BCHW + (1 - share) * batch.image_BCHW[partners(len(share), share.device)]
    return replace(batch, image_BCHW=image)


def class_probs(forward: Callable[[torch.Tensor], torch.Tensor], loader: Iterator[ImageBatch], count: int, *,
                flips: bool) -> Iterator[np.ndarray]:  # fmt: skip
    """Softmax probabilities (K,) float64 of the loader's first `count` images."""
    done = 0
    while done < count:
        image = next(loader).image_BCHW
        views = symmetries(image) if flips else [image]
        probs = torch.stack([forward(view).double().softmax(1).cpu() for view in views]).mean(0).numpy()
        if not np.isfinite(probs).all():
            raise UserError("the network answers with numbers that are not finite: it diverged; --set optim.lr lower.")
        yield from probs[: count - done]
        done += len(probs)


def symmetries(image_BCHW: torch.Tensor) -> list[torch.Tensor]:
    """The eight flips and quarter turns of square images."""
    turned = [torch.rot90(image_BCHW, k, (2, 3)) for k in range(4)]
    return turned + [view.flip(3) for view in turned]


def example(recipe: ClsRecipe, batch: int, device: torch.device) -> Example:
    """A network in training and a batch without data, for `medtrain.estimate`; with all 26 classes."""
    return Example(
        model=backbones.build_model(recipe, CLASSES).to(device).train(),
        inputs=torch.zeros((batch, 3, recipe.data.size, recipe.data.size), device=device),
        target=torch.zeros(batch, dtype=torch.int64, device=device),
        loss=lambda outputs, target: functional.cross_entropy(outputs, target, label_smoothing=recipe.smoothing),
        recomputes=recipe.train.recompute,
    )
