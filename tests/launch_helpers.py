"""Run a program of launch/ in this process or as the user does, in one of its own."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

from medtrain.errors import exit_code

ROOT = Path(__file__).resolve().parents[1]


def run_main(program: str, *arguments: object) -> int:
    """The program's exit code, run in this process."""
    main = importlib.import_module(f"medlaunch.{program}").main
    return exit_code(main, [str(a) for a in arguments])


def run_script(program: str, *arguments: object, ranks: int = 0, timeout: float = 300,
               environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """`python launch/<program>.py` or the same under torchrun; one thread a process."""
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    command = [*start, str(ROOT / "launch" / f"{program}.py"), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, check=False)
