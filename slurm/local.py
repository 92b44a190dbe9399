"""Run callables on this machine with submitit and follow their output."""

import contextlib
import errno
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GRACE_S = 10
WRITTEN_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its result, or the last line of its error."""

    ok: bool
    result: Any
    reason: str
    log: Path


@dataclass(frozen=True)
class OnThisMachine:
    """A job with the submitter's view of the GPUs: submitit's local executor hides them all from its processes."""

    job: Callable[[], Any]
    devices: str | None
    threads: int

    def __call__(self) -> Any:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if self.devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.devices
        os.environ["OMP_NUM_THREADS"] = str(self.threads)
        return self.job()


def follow_locally(job: Callable[[], Any], folder: Path, *, name: str, processes: int = 1) -> Outcome:
    """Run a job in processes of its own on this machine, echo its output as it comes, and tell how it ended."""
    import submitit

    own_folder(folder)
    executor = submitit.LocalExecutor(folder / name)
    # a year: on one's own machine no job is cut short
    executor.update_parameters(name=name, timeout_min=60 * 24 * 365, tasks_per_node=processes)
    print(f"== {name}", flush=True)
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    with stderr_into(folder / name / "controller.log"):
        handle = executor.submit(OnThisMachine(job, os.environ.get("CUDA_VISIBLE_DEVICES"), threads))
    first = handle.task(0).paths
    echo = Echo(first.stdout)
    try:
        while not handle.done():
            echo.more()
            time.sleep(0.25)
            if any_failed(handle, processes):
                time.sleep(GRACE_S)  # the others may end by themselves, and with a reason of their own
                break
    except BaseException:
        handle.cancel(check=False)
        raise
    echo.more()
    if not handle.done():
        handle.cancel(check=False)
    error = next((e for e in exceptions(handle, processes) if e is not None), None)
    if error is None:
        return Outcome(True, handle.results()[0], "", first.stdout)
    reason = last_error(str(error)) or type(error).__name__
    print(f"== {name} failed: {reason}\n   log: {first.stderr}", file=sys.stderr, flush=True)
    return Outcome(False, None, reason, first.stderr)


@contextlib.contextmanager
def stderr_into(path: Path) -> Iterator[None]:
    """Processes started meanwhile write their errors into a file: submitit's controller ends with a traceback when it
    is cancelled, which is nothing to show on a Ctrl-C.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(path, "ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def own_folder(folder: Path) -> None:
    """Make a folder that is its owner's alone, as it holds pickles or code that will run; nobody else may put another
    in its place. Raises PermissionError where somebody else's lies there, or a link.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        raise PermissionError(errno.EPERM, "a link to another folder lies there", str(folder))
    folder.chmod(0o700)
    above = stat.S_IMODE(folder.parent.stat().st_mode)
    if above & WRITTEN_BY_OTHERS:
        with contextlib.suppress(PermissionError):  # somebody else's, which the user chose
            folder.parent.chmod(above & ~WRITTEN_BY_OTHERS)


def exceptions(handle: Any, processes: int) -> list[BaseException | None]:
    """The error of each process that has ended."""
    tasks = [handle.task(k) for k in range(processes)]
    return [task.exception() for task in tasks if task.paths.result_pickle.exists() or task.done()]


def any_failed(handle: Any, processes: int) -> bool:
    """Whether a process of several failed while others may wait for it in a collective for ever."""
    return processes > 1 and any(error is not None for error in exceptions(handle, processes))


def last_error(text: str) -> str:
    """The last line of the form `SomeError: words`, which ends a Python traceback; submitit adds lines below it."""
    found = re.findall(r"^([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)$", text, re.MULTILINE)
    return re.sub(r"^medtrain\.errors\.\w+: ", "", found[-1].strip()) if found else ""  # those are sentences


class Echo:
    """Prints what is added to a log file, without submitit's own lines."""

    def __init__(self, path: Path):
        self.path, self.read = path, 0

    def more(self) -> None:
        """Print whole lines that are new since the last call."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self.read)
            fresh = file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self.read += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            if not line.startswith("submitit "):
                print(line, flush=True)
