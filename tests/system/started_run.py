"""A training as its user starts it, in processes of its own, which a test may hit."""

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from launch_helpers import ROOT
from slurm_cluster import alive, environment, pids

WAYS = ("SIGKILL to all", "SIGKILL to one rank", "SIGTERM", "SIGINT", "SIGUSR2 to all")


def command(pid: int) -> str:
    """A process's command line; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""


class StartedRun:
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

    def wait_for_a_writing(self, folder: Path, patience_s: float = 20) -> None:
        """Until a checkpoint is being written, if that comes soon."""
        end = time.monotonic() + patience_s
        while time.monotonic() < end and self.process.poll() is None:
            if any(name.startswith(".") and "checkpoint" in name for name in os.listdir(folder)):
                return

    def processes(self) -> list[int]:
        return [pid for pid in pids() if alive(pid) and environment(pid).get("MEDTRAIN_TEST_MARK") == self.mark]

    def ranks(self) -> list[int]:
        """The processes that train: neither torchrun nor their own loaders and trackers."""
        words = {pid: command(pid) for pid in self.processes()}
        return [pid for pid, told in words.items() if "train.py" in told and "torch.distributed.run" not in told]

    def rank(self, number: int) -> int:
        """The process of a rank."""
        return next(pid for pid in self.ranks() if environment(pid).get("RANK") == str(number))

    def wait_for_a_save(self, folder: Path) -> None:
        """Until a checkpoint of its own is there, or it has ended."""
        path = folder / "checkpoint_last.pt"
        before = path.stat().st_mtime_ns if path.exists() else 0
        while self.process.poll() is None and not (path.exists() and path.stat().st_mtime_ns != before):
            time.sleep(0.02)

    def wait_for_a_step(self, folder: Path) -> bool:
        """Until it has made a step; False where it ended before."""
        while not (folder / "status.json").is_file() or '"step": 0,' in (folder / "status.json").read_text():
            if self.process.poll() is not None:
                return False
            time.sleep(0.05)
        return True

    def hit(self, way: str, rng: random.Random) -> None:
        """End it in one of WAYS."""
        kind = getattr(signal, way.split()[0])
        if way.endswith("to all"):
            targets = self.processes()
        elif way.endswith("one rank"):
            ranks = self.ranks()  # none where it has just ended
            targets = [rng.choice(ranks)] if ranks else []
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
