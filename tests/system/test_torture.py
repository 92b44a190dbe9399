"""Runs that are killed again and again end as if nothing had happened: same weights, same rows, nothing left behind.

MEDTRAIN_KILLS says how often; `MEDTRAIN_KILLS=50 python -m pytest tests/system/test_torture.py -s` is the long form.
"""

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from launch_helpers import ROOT
from slurm_cluster import alive, environment, pids

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

KILLS = int(os.environ.get("MEDTRAIN_KILLS", "2"))
SEG = ("data.crop=32,32,32", "data.spacing_mm=0", "data.val_fraction=0.4", "train.batch=2", "train.epochs=30",
       "train.validate_every=10", "train.precision=fp32", "train.workers=0", "train.deterministic=true",
       "train.save_every_s=0")  # fmt: skip
CLS = ("data.size=32", "data.cancer=Oral Cancer", "train.batch=4", "train.epochs=12", "train.precision=fp32",
       "train.workers=1", "train.validate_every=4", "train.deterministic=true", "train.save_every_s=0")  # fmt: skip
WAYS = ("SIGKILL to all", "SIGKILL to one rank", "SIGTERM", "SIGINT", "SIGUSR2 to all")


class Run:
    """One training as its user starts it, in processes that carry a mark in their environment."""

    def __init__(self, arguments: Sequence[str], ranks: int, log: Path):
        self.mark = uuid.uuid4().hex
        start = [sys.executable]
        if ranks > 1:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        told = {**os.environ, "MEDTRAIN_TEST_MARK": self.mark, "OMP_NUM_THREADS": "1"}
        self.log, self.file = log, open(log, "ab")  # noqa: SIM115
        self.began = log.stat().st_size
        self.process = subprocess.Popen([*start, str(ROOT / "launch" / "train.py"), *arguments], stdout=self.file,
                                        stderr=self.file, env=told, start_new_session=True)  # fmt: skip

    def said(self) -> str:
        return self.log.read_bytes()[self.began :].decode("utf-8", "replace")

    def wait_for_steps(self) -> bool:
        """Until it trains; False where it ended before."""
        while "steps of batch" not in self.said():
            if self.process.poll() is not None:
                return False
            time.sleep(0.05)
        return True

    def processes(self) -> list[int]:
        return [pid for pid in pids() if alive(pid) and environment(pid).get("MEDTRAIN_TEST_MARK") == self.mark]

    def hit(self, way: str, rng: random.Random) -> None:
        """End it in one of WAYS."""
        kind = getattr(signal, way.split()[0])
        if way.endswith("to all"):
            targets = self.processes()
        elif way.endswith("one rank"):
            targets = [rng.choice([pid for pid in self.processes() if "RANK" in environment(pid)] or self.processes())]
        else:
            targets = [self.process.pid]
        for pid in targets:
            try:
                os.kill(pid, kind)
            except ProcessLookupError:
                continue

    def end(self, patience_s: float = 60) -> int:
        """Its exit code; fails where anything of it lives on for half a minute."""
        code = self.process.wait(timeout=patience_s)
        end = time.monotonic() + 30
        while self.processes():
            assert time.monotonic() < end, f"orphans: {self.processes()}"
            time.sleep(0.1)
        self.file.close()
        return code


def content(run: Path) -> tuple[dict[str, torch.Tensor], str]:
    return torch.load(run / "checkpoint_last.pt", weights_only=True)["model"], (run / "cases.csv").read_text()


@pytest.mark.parametrize(("task", "ranks"), [("brats", 1), ("brats", 2), ("multicancer", 1)])
def test_a_run_that_is_killed_again_and_again(
    task: str, ranks: int, cache: Path, image_cache: Path, tmp_path: Path
) -> None:
    recipe, sets, data = {"brats": ("brats_segresnet_demo", SEG, cache),
                          "multicancer": ("multicancer_mobilenetv3_demo", CLS, image_cache)}[task]  # fmt: skip
    words = [recipe, "--cache", str(data), *[part for item in sets for part in ("--set", item)]]
    shared = set(os.listdir("/dev/shm"))
    began = time.monotonic()
    whole = Run([*words, "--out", str(tmp_path / "whole")], ranks, tmp_path / "whole.log")
    assert whole.end(300) == 0, whole.said()[-2000:]
    spent = time.monotonic() - began
    rng, out = random.Random(ranks), tmp_path / "killed"
    ways = [WAYS[n % len(WAYS)] for n in range(KILLS)]
    rng.shuffle(ways)
    for number, way in enumerate(ways):
        run = Run([*words, "--out", str(out)], ranks, tmp_path / "killed.log")
        if run.wait_for_steps():
            time.sleep(rng.uniform(0, spent / (KILLS + 1)))
        run.hit(way, rng)
        code = run.end()
        print(f"{task}, {ranks} ranks, {number + 1}: {way}, exit code {code}", flush=True)
    last = Run([*words, "--out", str(out)], ranks, tmp_path / "killed.log")
    assert last.end(300) == 0, last.said()[-2000:]
    (weights, rows), (wanted, wanted_rows) = content(out), content(tmp_path / "whole")
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert rows == wanted_rows
    assert set(os.listdir("/dev/shm")) <= shared
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    print(f"{task}, {ranks} ranks: same weights and rows after {KILLS} kills", flush=True)
