"""The loop: draw a batch, step, say how it goes, validate, save. Knows no task and no launcher."""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from medtrain import checkpoint, distributed, divergence
from medtrain.distributed import Ranks
from medtrain.ema import Ema
from medtrain.errors import Failed, Stopped, UserError
from medtrain.meter import Meter
from medtrain.profiling import Profile, shares
from medtrain.recipe import Recipe
from medtrain.results import CaseRow
from medtrain.sampling import Stream
from medtrain.schedule import learning_rate
from medtrain.selftest import check_convolutions
from medtrain.strategies import make_strategy
from medtrain.strategy import forwarding
from medtrain.tables import to_markdown
from medtrain.task import Task
from medtrain.tracker import Tracker
from medtrain.wording import listed
from medtrain.writer import Writer


class Engine:
    """One member's training on this rank.

    `stop` is asked after every step; once it says yes on any rank, all save and leave training with `Stopped`.
    `profile` steps are recorded by torch's profiler, on rank 0.
    """

    def __init__(self, recipe: Recipe, task: Task, run: Path, ranks: Ranks,
                 stop: Callable[[], bool] | None = None, profile: int = 0):  # fmt: skip
        train = recipe.train
        if ranks.world > task.epoch_length():
            raise UserError(
                f"there are {ranks.world} processes for the {task.epoch_length()} samples of an epoch: start fewer, or "
                "add cases."
            )
        self.recipe, self.task, self.split, self.run, self.ranks = recipe, task, task.split, run, ranks
        torch.manual_seed(train.seed)
        torch.use_deterministic_algorithms(train.deterministic, warn_only=True)
        model = task.build_model()
        self.strategy = make_strategy(model, task.parameter_groups(model), recipe, ranks)
        self._check_alike(self.strategy.precision)
        check_convolutions(self.strategy.precision, ranks.device)
        self.ema = Ema(self.strategy.model, recipe.optim.ema) if recipe.optim.ema else None
        self.steps_per_epoch = task.epoch_length() / train.batch
        self.total = max(1, math.ceil(train.epochs * self.steps_per_epoch - 1e-9))
        self.step, self.best = 0, -math.inf
        self.scores: list[float] = []  # of every validation so far; the plateau schedule reads them
        self.saved_at = time.monotonic()
        self.writer = Writer()
        self.stop = stop
        self.profiled = profile if ranks.is_main else 0
        self.profile: Profile | None = None

    @staticmethod
    def _check_alike(precision: str) -> None:
        """Raise UserError where ranks would train in different precisions: GPUs of two kinds may, by `auto`, and one
        that scales its gradients would drown the others' without a word.
        """
        found = sorted(set(distributed.gather(precision)))
        if len(found) > 1:
            raise UserError(f"the processes' devices would train in {listed(found)}: --set train.precision=fp32, or "
                            "take GPUs of one kind.")  # fmt: skip

    # -- training -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train from the last checkpoint, if there is one, to the end; leaves checkpoint_best.pt."""
        self._resume()
        self.tracker = Tracker(self.run, self.recipe, active=self.ranks.is_main, step=self.step, total=self.total)
        known = {self.task.best_by: self.scores[-1]} if self.scores else None
        self.tracker.beat(self.step, self.epoch, scores=known)
        if self.profiled and self.step < self.total:
            self.profile = Profile(self.run, self.profiled, self.ranks.device)
        try:
            if self.step < self.total:
                gc.disable()  # ranks would collect at different steps and wait for each other
                self._train_steps(self.tracker)
                self.tracker.say(f"parts of a step: {shares(self.meter.spent)}")
                if self.profile:
                    self.tracker.say(f"note: no profile: it needs {self.profile.needed} steps of one start")
        finally:
            if self.profile:
                self.profile.end()
            gc.enable()
            self.writer.wait()  # whatever happened, what was to be saved is on the disk
        distributed.barrier()

    def _train_steps(self, tracker: Tracker) -> None:
        train = self.recipe.train
        stream = Stream(train.seed, self.task.epoch_length(), train.batch, train.accumulate, self.ranks.world,
                        self.ranks.rank, self.step)  # fmt: skip
        loader = self.task.loader(stream, self.ranks.device)
        self.meter = meter = Meter(self.ranks)
        self.strategy.train_mode()
        gc.collect()
        while self.step < self.total:
            lr = learning_rate(self.recipe.optim, self.step, self.total, self.steps_per_epoch, self.scores)
            self.strategy.freeze(self.epoch)
            loss, skipped = self.train_step(loader, lr, meter)
            meter.add(loss, skipped, train.batch)
            tracker.advance(meter.note)
            distributed.pulse(self.step)
            if self.profile and self.profile.step():
                tracker.say(to_markdown(self.profile.table()) + f"trace in {self.profile.folder}")
                self.profile = None
            if self.step % train.log_every == 0 or self.step == self.total:
                gc.collect(1)
                distributed.sync_hosts()
                tracker.scalars(self.step, {**meter.read(), **self._rates(lr)})
                if meter.skipped_in_row >= train.max_skipped:
                    self._give_up(meter.skipped_in_row)
            if self._crosses(train.validate_every):
                self._validate(tracker)
                self.save()
                meter.restart()
            elif self._is_due():
                self.save()
            tracker.beat(self.step, self.epoch)
            self._leave_if_told(tracker)

    def _rates(self, lr: float) -> dict[str, float]:
        scale = self.strategy.loss_scale()
        return {"train/lr": lr, "train/epoch": self.epoch, **({} if scale is None else {"train/loss_scale": scale})}

    def _is_due(self) -> bool:
        """Whether it is time to save; asked of rank 0 alone, but where the others must take part, at log lines."""
        due = time.monotonic() - self.saved_at > self.recipe.train.save_every_s
        if not self.strategy.shards:
            return due and self.ranks.is_main
        return self.step % self.recipe.train.log_every == 0 and bool(distributed.broadcast(due))

    def _leave_if_told(self, tracker: Tracker) -> None:
        if self.stop is None or not distributed.any_rank(self.stop()):
            return
        self.save()
        self.writer.wait()
        tracker.say(f"told to stop: saved at step {self.step} of {self.total}")
        raise Stopped(f"stopped at step {self.step} of {self.total}")

    def _give_up(self, row: int) -> NoReturn:
        """Leave what reproduces the first of `row` skipped steps; the weights have not moved since."""
        first = self.step - row
        content = {"model": self.strategy.weights(), **self._about()}
        if self.ranks.is_main:
            divergence.record(self.run, self.recipe, self.task, first, row, self.ranks.world, content)
        distributed.barrier()  # a rank that ended earlier would have the first one killed while it writes
        raise Failed(
            f"{self.run}: the gradients of {row} steps, {first} to {self.step - 1}, were not finite: lower optim.lr, "
            f"set optim.clip_norm, or see which case it is: python launch/replay.py {self.run}"
        )

    def train_step(self, loader: Iterator[Any], lr: float, meter: Meter) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimiser step; returns this rank's mean loss, and 1 where the step was skipped, still on the device."""
        train, strategy = self.recipe.train, self.strategy
        # Dropout is a function of (seed, step, rank), so that a resumed run draws the same masks.
        torch.manual_seed(step_seed(train.seed, self.step, self.ranks.rank))
        total = torch.zeros((), device=self.ranks.device)
        for micro in range(train.accumulate):
            with meter.timed("data"):
                batch = next(loader).to(self.ranks.device)
            if micro == 0:  # before a host waits for its GPU, which waits for the other ranks'
                distributed.sync_hosts()
            last = micro == train.accumulate - 1
            with contextlib.nullcontext() if last else strategy.accumulating():
                with meter.timed("forward"):
                    outputs = strategy.forward(batch.inputs)
                    loss = self.task.loss(outputs, batch) / train.accumulate
                with meter.timed("backward"):
                    strategy.backward(loss)
            total += loss.detach()
            del outputs, loss  # they hold nodes of gradients, which CUDA graphs are to make anew
        with meter.timed("optimizer"):
            skipped = strategy.step(lr)
            if self.ema:
                self.ema.update(self.step + 1)
        self.step += 1
        return total, skipped

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.steps_per_epoch

    def _crosses(self, epochs: int) -> bool:
        """Whether the step just done completed a multiple of `epochs`, or the run."""
        now, before = (math.floor(s / self.steps_per_epoch + 1e-9) // epochs for s in (self.step, self.step - 1))
        return now > before or self.step == self.total

    # -- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, cases: Sequence[str], part: str, *, thorough: bool,
                 show: Callable[[np.ndarray], None] | None = None) -> list[CaseRow]:  # fmt: skip
        """Score cases, each on one rank; every rank gets all rows in the order of `cases`."""
        rows: list[CaseRow] = []
        first: tuple[str, np.ndarray] | None = None
        with self.ema.applied() if self.ema else contextlib.nullcontext():
            self.strategy.sync_buffers()
            network = self.strategy.evaluated().eval()
            forward = forwarding(network, self.strategy.precision, self.ranks.device, self.strategy.layout)
            mine = cases[self.ranks.rank :: self.ranks.world]
            for case, prediction in self.task.predictions(forward, mine, thorough=thorough):
                scores = self.task.score(case, prediction, thorough=thorough)
                rows.append(CaseRow(member=self.recipe.name, case=case, part=part, scores=scores))
                first = first or (case, prediction)
        self.strategy.train_mode()
        place = {case: n for n, case in enumerate(cases)}
        everyone = [row for share in distributed.gather(rows) for row in share]
        everyone.sort(key=lambda row: place[row.case])
        if show and first and self.ranks.is_main:
            show(self.task.picture(everyone, *first))
        return everyone

    def _validate(self, tracker: Tracker) -> None:
        """Score the validation cases and keep the weights if they are the best so far."""
        distributed.sync_hosts()
        if not self.split.val:  # nothing to choose by: the newest weights are the best
            self._save_best(None)
            return
        rows = self.evaluate(self.split.val, "val", thorough=False,
                             show=lambda image: tracker.picture(self.step, "val/picture", image))  # fmt: skip
        scores = self.task.summary(rows)
        score = scores[self.task.best_by]
        self.scores.append(score)
        tracker.scalars(self.step, {f"val/{name}": value for name, value in scores.items()})
        tracker.beat(self.step, self.epoch, scores={self.task.best_by: score})
        shown = list(scores.items())[:4]  # the rest is in TensorBoard
        tracker.say(
            f"epoch {self.epoch:.0f}: " + ", ".join(f"{name} {value:.3f}" for name, value in shown)
            + (" (best so far)" if score >= self.best else "")
        )  # fmt: skip
        if score >= self.best:  # of equal ones the later: it was trained longer, and at a lower rate
            self.best = score
            self._save_best(score)

    # -- files --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write checkpoint_last.pt; ranks hold the same state, so rank 0's is everybody's."""
        self.saved_at = time.monotonic()
        if self.ranks.is_main or self.strategy.shards:
            state = {**self.strategy.state(), "ema": self.ema.state() if self.ema else []}
        if self.ranks.is_main:
            everything = {**state, **self._about(), "best": self.best, "scores": self.scores}
            self.writer.write(self.run / checkpoint.LAST, everything, self.run / checkpoint.PREVIOUS)

    def _save_best(self, score: float | None) -> None:
        if not self.ranks.is_main and not self.strategy.shards:
            return
        with self.ema.applied() if self.ema else contextlib.nullcontext():
            content = {"model": self.strategy.weights(), **self._about(), "score": score}
            if not self.ranks.is_main:
                return
            self.writer.write(self.run / checkpoint.BEST, content)

    def _about(self) -> dict[str, Any]:
        parts = {"train": list(self.split.train), "val": list(self.split.val), "test": list(self.split.test)}
        return {
            "recipe": self.recipe.to_json(),
            "signature": self.recipe.signature,
            "step": self.step,
            "epoch": self.epoch,
            "split": parts,
            **self.task.facts(),
        }

    def _resume(self) -> None:
        path = self._newest()
        if path is None:
            return
        content = checkpoint.load(path)
        if content.get("signature") != self.recipe.signature:
            raise UserError(f"{path} is of another recipe: give another --out or remove that folder.")
        if content.get("split") != self._about()["split"]:
            raise UserError(f"{path} is of a run on another split: give another --out or remove that folder.")
        try:
            self.strategy.load(content)
            if self.ema:
                self.ema.load(content["ema"])
            self.step, self.best, self.scores = int(content["step"]), float(content["best"]), list(content["scores"])
        except (LookupError, TypeError, ValueError, AttributeError):  # no RuntimeError: memory, or a lost partner
            words = "is damaged or of another version"
            raise UserError(f"{path} {words}: remove it or copy it again.") from None
        if self.ranks.is_main and self.step < self.total:
            print(f"going on from step {self.step} of {self.total}", flush=True)

    def _newest(self) -> Path | None:
        """Rank 0 looks, and sets a damaged checkpoint aside; all ranks take the same one."""
        found, problem = None, ""
        if self.ranks.is_main:
            try:
                found = checkpoint.newest(self.run)
            except UserError as error:
                problem = str(error)
        found, problem = distributed.broadcast((found, problem))
        if problem:
            raise UserError(problem)
        if found and found[1] and self.ranks.is_main:
            print(f"note: {found[1]}", flush=True)
        return found[0] if found else None

    def load_best(self) -> None:
        """Put checkpoint_best.pt's weights into the model (and into the average that evaluation uses)."""
        path = self.run / checkpoint.BEST
        self.strategy.take_weights(checkpoint.load(path), path)
        if self.ema:
            self.ema.load([tensor.detach() for tensor in self.ema.parameters])


def step_seed(seed: int, step: int, rank: int) -> int:
    """What dropout draws from in a step on a rank."""
    return hash((seed, step, rank)) & 0x7FFFFFFF
