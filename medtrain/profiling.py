"""Where a step's time goes: torch's profiler over some steps, as a trace and as a short table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PARTS = ("data", "forward", "backward", "optimizer")
WAIT, WARMUP = 2, 1  # steps before the measured ones: the first ones compile, allocate and fill queues
# How the names of collectives begin in a trace, on GPUs and on CPUs.
COLLECTIVES = ("nccl:", "gloo:", "c10d::")


class Profile:
    """Records `steps` steps into `run`/profile (for TensorBoard or https://ui.perfetto.dev) once `step` was called
    often enough; `table` then tells the shares.
    """

    def __init__(self, run: Path, steps: int, device: torch.device):
        self.steps, self.folder = steps, run / "profile"
        self.needed = WAIT + WARMUP + steps
        self.seen = 0
        self.rows: list[tuple[str, float, float]] = []
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler: Any = torch.profiler.profile(
            activities=kinds, schedule=torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=steps, repeat=1),
            on_trace_ready=self._keep, profile_memory=True, record_shapes=False,
        )  # fmt: skip
        self._profiler.start()

    def step(self) -> bool:
        """One more step is done; True as soon as the last measured one is."""
        self._profiler.step()
        self.seen += 1
        if self.seen != self.needed:
            return False
        self._profiler.stop()
        return True

    def end(self) -> None:
        """Stop without a table; a profiler that still records when the interpreter ends brings it down."""
        if self.seen < self.needed:
            self.seen = self.needed
            self._profiler.on_trace_ready = None
            self._profiler.stop()

    def _keep(self, profiler: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.profiler.tensorboard_trace_handler(str(self.folder))(profiler)
        times: dict[str, float] = dict.fromkeys((*PARTS, "all-reduce"), 0.0)
        for event in profiler.key_averages():
            name = event.key.removeprefix("step/")
            spent = event.cpu_time_total / 1e3 / self.steps
            if name in PARTS and event.key.startswith("step/"):
                times[name] += spent
            elif event.key.startswith(COLLECTIVES):
                times["all-reduce"] += max(spent, event.device_time_total / 1e3 / self.steps)
        whole = sum(times[part] for part in PARTS)
        self.rows = [(part, spent, spent / whole if whole else 0.0) for part, spent in times.items()]

    def table(self) -> list[list[str]]:
        """Lines of a table: part, milliseconds a step, share. The all-reduce lies inside the others."""
        lines = [["part of a step", "ms", "share"]]
        lines += [[part, f"{spent:.1f}", f"{share:.0%}"] for part, spent, share in self.rows]
        return lines


def shares(spent: Mapping[str, float]) -> str:
    """Counted seconds of the parts as text, such as `data 2 %, forward 30 %`."""
    whole = sum(spent.values())
    return ", ".join(f"{part} {100 * seconds / whole:.0f} %" for part, seconds in spent.items()) if whole else ""
