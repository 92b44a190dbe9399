"""Processes that end when they should: children with their parent, programs on SIGTERM and Ctrl-C."""

import contextlib
import ctypes
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

from medtrain.errors import Failed, UserError

PR_SET_PDEATHSIG = 1
# Longer than any clean-up, shorter than the 30 seconds that SLURM gives by default before SIGKILL.
PATIENCE_S = 20


def stay_with_parent() -> None:
    """In a child of multiprocessing: leave Ctrl-C, SIGTERM and SIGUSR2 to the parent, and be killed when it ends.

    A terminal and SLURM signal the whole group at once, and DALI waits for ever for a worker that died of it; a worker
    whose parent was killed would wait for ever for work. Does nothing in a main process.
    """
    if multiprocessing.parent_process() is None:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # SLURM's warning
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


@contextlib.contextmanager
def signals_wait(*more: signal.Signals) -> Iterator[None]:
    """Ctrl-C and SIGUSR2 (and `more`) wait for the end of the block, and never reach processes that are started in it:
    children that have not yet called `stay_with_parent` would die of them, with tracebacks. SIGTERM, by which libraries
    end their children, does not wait.
    """
    resource_tracker.ensure_running()  # started inside it would let the signals in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGUSR2, *more))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_on_signals() -> None:
    """SIGTERM and Ctrl-C raise KeyboardInterrupt, so that `finally` clauses run; if the clean-up hangs (a library that
    waits for a dead process), the program ends all the same after PATIENCE_S.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    if not threading.main_thread().is_alive():  # the program has ended, and only cleans up
        return
    watchdog = threading.Timer(PATIENCE_S, os._exit, (130,))
    watchdog.daemon = True
    watchdog.start()
    raise KeyboardInterrupt


SHARED = Path("/dev/shm")


def remove_dead_semaphores(folder: Path = SHARED) -> None:
    """Remove this user's named semaphores whose process is dead: one that was killed together with its tracker leaves
    them in shared memory. Only names that hold the process's number (joblib's loky) tell whose they are.
    """
    if not folder.is_dir():
        return
    for path in folder.glob("sem.loky-*"):
        found = re.match(r"sem\.loky-(\d+)-", path.name)
        try:
            if found and path.stat().st_uid == os.getuid() and not Path(f"/proc/{found[1]}").exists():
                path.unlink(missing_ok=True)
        except OSError:  # another process was quicker
            continue


class Watch:
    """Looks after a loader's worker processes. A library that waits for one that died may wait for ever: once one is
    dead the others are killed too, whoever would wait for them is told so, and a main process that has waited for
    GRACE_S since then ends.
    """

    GRACE_S = 10.0

    def __init__(self, processes: Sequence[Any]):
        self._dead = ""
        self._ended = threading.Event()
        self._since = math.inf
        self._processes = list(processes)
        if processes:
            threading.Thread(target=self._look, daemon=True).start()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The main process waits for the workers inside. Raises Failed where one is known to be dead."""
        if self._dead:
            raise Failed(self._dead)
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = math.inf

    def verdict(self) -> str:
        """What to say where a worker is dead, else an empty text; asked after an error that its death may have made."""
        self._ended.wait(2.0 if self._processes else 0.0)
        return self._dead

    def _look(self) -> None:
        connection.wait([process.sentinel for process in self._processes])
        time.sleep(0.1)  # the loader's own observer asks too, and only one is told
        code = next((process.exitcode for process in self._processes if process.exitcode is not None), None)
        if code == 0:  # the loader was closed
            return
        rank = os.environ.get("RANK", "0")
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        self._dead = f"a loader process of rank {rank} ended by {how} (9: often for memory): lower train.workers"
        self._ended.set()
        for process in self._processes:
            with contextlib.suppress(OSError, ValueError):
                process.kill()
        died = time.monotonic()
        # the main process may be in the middle of a step now and wait for the dead one only later
        while time.monotonic() - max(died, self._since) < self.GRACE_S:
            time.sleep(0.2)
        print(f"error: {self._dead}", file=sys.stderr, flush=True)
        os._exit(1)


def in_processes(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int, *, what: str) -> Iterator[Any]:
    """Yield function(job) for every job, as they finish, from at most `workers` processes; an error ends all.

    Two jobs a process are under way at most, so memory does not grow with their number. `what` tells in the error what
    a killed process was doing.
    """
    if not jobs:
        return
    # spawn: the children start small and inherit no threads
    with ProcessPoolExecutor(
        max(1, min(workers, len(jobs))), mp_context=multiprocessing.get_context("spawn"), initializer=stay_with_parent
    ) as pool:
        waiting = list(reversed(jobs))
        running: set[Future[Any]] = set()
        try:
            while waiting or running:
                while waiting and len(running) < 2 * max(1, workers):
                    with signals_wait():  # it may start a process
                        running.add(pool.submit(function, waiting.pop()))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise UserError(f"a process that {what} was killed (memory?): give fewer --workers.") from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
