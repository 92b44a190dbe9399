"""What a run shows while it goes, on rank 0: metrics.jsonl, status.json, TensorBoard, and lines on the terminal."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medtrain.files import replacing
from medtrain.progress import Progress
from medtrain.recipe import Recipe, flat

STATUS = "status.json"
BEAT_S = 5.0


class Tracker:
    """Writes under `run`; a tracker that is not `active` does nothing, so that callers need not ask for the rank."""

    def __init__(self, run: Path, recipe: Recipe, *, active: bool, step: int, total: int):
        self.active, self.hparams = active, flat(recipe)
        self.progress = Progress(total, "train", start=step, quiet=not active)
        self.writer: Any = None
        self.status = run / STATUS
        self.total, self.first, self.began, self.beaten = total, step, time.monotonic(), -BEAT_S
        self.scores: dict[str, float] = {}
        if active:
            from torch.utils.tensorboard import SummaryWriter

            self.lines = run / "metrics.jsonl"
            _drop_after(self.lines, step)
            self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
            self.writer.add_text("recipe", f"```json\n{recipe.to_json()}\n```", 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log values by name, such as train/loss, at a step."""
        if not self.active:
            return
        with open(self.lines, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **{k: round(float(v), 6) for k, v in values.items()}}) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def beat(self, step: int, epoch: float, *, scores: Mapping[str, float] | None = None, phase: str = "train") -> None:
        """Say in status.json where the run stands, every few seconds and at every score; others read it meanwhile."""
        self.scores |= scores or {}
        now = time.monotonic()
        if not self.active or (not scores and phase == "train" and now - self.beaten < BEAT_S and step < self.total):
            return
        self.beaten = now
        spent = (now - self.began) / max(1, step - self.first)
        left_s = round(spent * (self.total - step)) if step > self.first else None
        told = {"phase": phase, "step": step, "total": self.total, "epoch": round(epoch, 3), "scores": self.scores,
                "time": time.time(), "left_s": left_s}  # fmt: skip
        with replacing(self.status, flush=False) as temporary:  # only the present matters
            temporary.write_text(json.dumps(told) + "\n", encoding="utf-8")

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Log an RGB picture (H,W,3) uint8."""
        if self.active:
            self.writer.add_image(name, image_HWC, step, dataformats="HWC")

    def advance(self, note: str) -> None:
        """One more step is done."""
        self.progress.advance(note)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if not self.active:
            return
        if self.progress.bar is not None:
            self.progress.bar.write(text)
        else:
            print(text, flush=True)

    def close(self, scores: Mapping[str, float]) -> None:
        """Write the hyper-parameters with the final scores, and end."""
        self.progress.close()
        if self.active:
            kept = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in self.hparams.items()}
            self.writer.add_hparams(kept, {f"final/{k}": v for k, v in scores.items()}, run_name=".")
            self.writer.close()


def _drop_after(path: Path, step: int) -> None:
    """Remove lines of steps that a resumed run will do again, and a line cut short by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
