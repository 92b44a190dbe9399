"""Brain-tumour segmentation as the engine sees it: model, loss, predict, score."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from medkernels.dispatch import Impl
from medseg import infer, losses, metrics, models, resident
from medseg.augment import VolumeSource
from medseg.cache import Cache, read_grid, read_label_map, reference_name
from medseg.cases import CHANNELS, patient_of
from medseg.figures import overlay
from medseg.findings import scans_voxels
from medseg.geometry import Grid
from medseg.labels import KNOWN
from medseg.preparation import Preparation
from medseg.recipes import SegRecipe
from medtrain.cache import check_preparation
from medtrain.errors import UserError
from medtrain.estimate import Example
from medtrain.patients import owners
from medtrain.results import CaseRow, means
from medtrain.sampling import Stream
from medtrain.splits import Split, split_cases
from medtrain.strategy import Group, one_group


class SegTask:
    """The task over one cache; raises UserError where recipe and cache do not fit."""

    best_by = "mean"

    def __init__(self, recipe: SegRecipe, cache: Cache):
        check_preparation(cache.path, cache.preparation, Preparation().version)
        self.recipe, self.cache = recipe, cache
        cache.verifying = recipe.data.verify
        self.label_map = read_label_map(cache)
        if abs(cache.spacing_mm - recipe.data.spacing_mm) > 1e-6:
            raise UserError(
                f"{cache.path} has spacing {cache.spacing_mm:g} mm, the recipe {recipe.data.spacing_mm:g} (0: the "
                f"scans' own): prepare it with --spacing-mm {recipe.data.spacing_mm:g}, or "
                f"--set data.spacing_mm={cache.spacing_mm:g}."
            )
        data = recipe.data
        try:
            self.split: Split = split_cases(
                cache.ids,
                patients=owners(cache.ids, cache.patients, patient_of),
                seed=data.split_seed,
                fold=data.fold,
                folds=data.folds,
                val_fraction=data.val_fraction,
                test_fraction=data.test_fraction,
                holdout=data.holdout,
            )
        except ValueError as error:
            raise UserError(f"{cache.path} can not be split: {error}; change data.val_fraction or add cases.") from None
        for case in self.split.train:
            for code in (self.label_map.edema, self.label_map.core, self.label_map.enhancing):
                cache.array(case, f"voxels_{code}")
            cache.array(case, "label")
        for case in (*self.split.val, *self.split.test):
            self.grid(case)

    def build_model(self) -> nn.Module:
        """The recipe's network with fresh weights; its kernels are tried on the GPU that it is going to run on."""
        models.try_kernels(self.recipe)
        return models.build_model(self.recipe)

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        """Mean loss over a batch."""
        kernels = self.recipe.model.kernels
        return losses.supervised_loss(outputs, batch.label_BDHW, self.label_map, self.recipe.loss, kernels)

    def parameter_groups(self, model: nn.Module) -> list[Group]:
        """One group: these networks are trained from scratch."""
        return one_group(model)

    def predictions(
        self, forward: Callable[[torch.Tensor], torch.Tensor], cases: Sequence[str], *, thorough: bool
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Region probabilities (3,D,H,W) float32 in the crop box at the scan's own spacing, case by case."""
        flips = thorough and self.recipe.evaluate.flips
        for case in cases:
            probs = infer.region_probs(forward, self.cache.read(case, "image"), self.recipe, flips=flips)
            yield case, infer.to_native(probs, self.grid(case).native)

    def score(self, case: str, prediction: np.ndarray, *, thorough: bool) -> dict[str, float]:
        """Dice per region on the scan's own spacing; `thorough` HD95 too, which takes too long while training."""
        spacing_mm = self.grid(case).voxel_mm if thorough else None
        return metrics.score_case(self.label_map.label(prediction), self.reference(case), self.label_map, spacing_mm)

    def summary(self, rows: Sequence[CaseRow]) -> dict[str, float]:
        """The mean of each score over cases."""
        return means(rows)

    def picture(self, rows: Sequence[CaseRow], case: str, prediction: np.ndarray) -> np.ndarray:
        """Scan, reference and prediction on the slice with the most tumour, (H,W,3) uint8."""
        return overlay(self.flair(case), self.reference(case), self.label_map.label(prediction), self.label_map)

    def epoch_length(self) -> int:
        """Crops of one epoch."""
        return len(self.split.train) * self.recipe.data.crops_per_case

    def loader(self, stream: Stream, device: torch.device) -> Iterator[Any]:
        """This rank's batches, from volumes on the GPU or from DALI."""
        from medseg.pipeline import VolumeLoader

        recipe = self.recipe
        self._tell_small(quiet=stream.rank > 0)
        on_cpu = device.type == "cpu"
        operations = [name for name in recipe.augment.operations if not (on_cpu and name == "warp")]
        source = VolumeSource(
            cache=str(self.cache.path), cases=self.split.train, crop=recipe.data.crop, augment=recipe.augment,
            stream=stream, foreground=recipe.data.foreground, crops_per_case=recipe.data.crops_per_case, warps=on_cpu,
            verify=recipe.data.verify,
        )  # fmt: skip
        if resident.stays(recipe, self.cache, self.split.train, device):
            return resident.ResidentLoader(
                source, self.cache, batch=stream.micro_batch, device=device, quiet=stream.rank > 0
            )
        return VolumeLoader(
            source, batch=stream.micro_batch, channels=len(self.cache.channels), crop=recipe.data.crop,
            operations=operations, workers=recipe.train.workers, device=device,
        )  # fmt: skip

    def _tell_small(self, *, quiet: bool) -> None:
        """Say how many training cases are smaller than the crop: far too large a crop learns mostly zeros."""
        crop, cases = self.recipe.data.crop, self.split.train
        sizes = [self.cache.array(case, "image").shape[1:] for case in cases]
        small = sum(any(n < c for n, c in zip(size, crop, strict=True)) for size in sizes)
        if small and not quiet:
            words = f"{small} of {len(cases)} training cases are smaller than the crop {' x '.join(map(str, crop))}"
            print(f"note: {words} and are padded with zeros", flush=True)

    def judged(self) -> list[tuple[str, tuple[str, ...]]]:
        """The parts of the split that the final rows are about; the last one stands in the table."""
        return [("test", self.split.test)] if self.split.test else [("val", self.split.val)]

    def warnings(self) -> list[str]:
        """None: networks begin afresh."""
        return []

    def about(self) -> dict[str, Any]:
        """What done.json tells beside the scores."""
        return {"label_map": self.label_map.name}

    def facts(self) -> dict[str, Any]:
        """What prediction needs beside the weights."""
        return {"label_map": self.label_map.to_dict(), "preparation": {**self.cache.preparation, **self.voxels}}

    @cached_property
    def voxels(self) -> dict[str, list[float]]:
        """Which voxel sizes the scans have where they are kept at their own, so that others are recognised."""
        return scans_voxels(self.cache)

    def grid(self, case: str) -> Grid:
        """The way back to the scan's own grid; raises UserError where it does not lead there."""
        return read_grid(self.cache, case)

    def reference(self, case: str) -> np.ndarray:
        """The true label in the crop box at the scan's own spacing, (D,H,W) uint8."""
        return self.cache.read(case, reference_name(self.cache, case))

    def flair(self, case: str) -> np.ndarray:
        """The FLAIR volume in the crop box at the scan's own spacing, for pictures."""
        volume = torch.from_numpy(self.cache.read(case, "image")[:1].astype(np.float32))
        return infer.to_native(volume, self.grid(case).native)[0]


def example(recipe: SegRecipe, batch: int, device: torch.device, kernels: Impl = "reference") -> Example:
    """A network in training and a batch without data, for `medtrain.estimate`; by MONAI's operations unless told."""
    recipe = replace(recipe, model=replace(recipe.model, kernels=kernels))
    side = recipe.data.crop
    return Example(
        model=models.build_model(recipe).to(device).train(),
        inputs=torch.zeros((batch, len(CHANNELS), *side), device=device),
        target=torch.zeros((batch, *side), dtype=torch.uint8, device=device),
        loss=lambda outputs, label: losses.supervised_loss(outputs, label, KNOWN["msd"], recipe.loss, kernels),
        recomputes=recipe.train.recompute,
    )
