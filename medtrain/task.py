"""What the engine asks of a task. `medseg.task` and `medcls.task` hold two."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from medtrain.results import CaseRow
from medtrain.sampling import Stream
from medtrain.splits import Split
from medtrain.strategy import Forward, Group


class Task(Protocol):
    """Network, loss, batches and scores of one recipe on one cache."""

    best_by: str  # which entry of `summary` chooses the best checkpoint; larger is better
    split: Split

    def warnings(self) -> list[str]:
        """What is to be told before training: why its scores would mislead."""

    def build_model(self) -> nn.Module:
        """The network as training starts from it."""

    def parameter_groups(self, model: nn.Module) -> list[Group]:
        """Its trainable parameters, with `lr_scale` and `frozen_epochs` a group."""

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        """Mean loss over a batch; `outputs` are as `Single.forward` gives them, in float32."""

    def predictions(
        self, forward: Forward, cases: Sequence[str], *, thorough: bool
    ) -> Iterable[tuple[str, np.ndarray]]:
        """Each case with its prediction; `thorough` for the final rows (flips and the like), else quick."""

    def score(self, case: str, prediction: np.ndarray, *, thorough: bool) -> dict[str, float]:
        """What a row of results holds of a case; `thorough` as in `predictions`."""

    def summary(self, rows: Sequence[CaseRow]) -> dict[str, float]:
        """Scores of many cases together."""

    def picture(self, rows: Sequence[CaseRow], case: str, prediction: np.ndarray) -> np.ndarray:
        """What TensorBoard shows of a validation and of its first case, (H,W,3) uint8."""

    def epoch_length(self) -> int:
        """Samples of one epoch, equally many of each training case."""

    def loader(self, stream: Stream, device: torch.device) -> Iterator[Any]:
        """An endless iterator of this rank's batches."""

    def facts(self) -> dict[str, Any]:
        """Plain values that a checkpoint must carry to be used alone (label map, preparation)."""

    def judged(self) -> list[tuple[str, tuple[str, ...]]]:
        """Parts whose cases get final rows, by name; the scores are those of the last one."""

    def about(self) -> dict[str, Any]:
        """What done.json tells beside the scores."""
