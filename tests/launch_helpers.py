"""Run a program of launch/ in this process or as the user does, in one of its own."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medtrain.errors import exit_code

ROOT = Path(__file__).resolve().parents[1]


def run_main(program: str, *arguments: object) -> int:
    """The program's exit code, run in this process."""
    main = importlib.import_module(f"medlaunch.{program}").main
    return exit_code(main, [str(a) for a in arguments])


def run_script(program: str, *arguments: object, ranks: int = 0, timeout: float = 600,
               environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """`python launch/<program>.py` or the same under torchrun; one thread a process."""
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    command = [*start, str(ROOT / "launch" / f"{program}.py"), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, check=False)


def in_this_process(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int, *, what: str) -> Iterator[Any]:
    """What `in_processes` does, without the seconds that a process takes to start."""
    for job in jobs:
        yield function(job)


def check_refused(code: int, told: str, named: str, words: str, out: Path) -> None:
    """Exit code 2, one sentence on stderr that names the thing and what is wrong, and nothing left in `out`."""
    lines = [line for line in told.splitlines() if line.strip()]
    assert code == 2, told
    assert len(lines) == 1, told
    assert lines[0].startswith("error: ")
    assert lines[0].isprintable()
    assert len(lines[0]) < 300 + len(str(out.parent)), lines[0]
    assert named in lines[0], lines[0]
    assert re.search(words, lines[0]), lines[0]
    assert "Traceback" not in told
    assert [str(path) for path in out.rglob("*") if not path.is_dir()] == []
