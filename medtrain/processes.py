"""Child processes that end with their parent, however it ends."""

import ctypes
import multiprocessing
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """In a child of multiprocessing: be killed when the parent ends. A loader's worker would else wait for ever for
    work from a parent that was killed. Does nothing in a main process, or where the system has no such call.
    """
    if multiprocessing.parent_process() is None:
        return
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def interrupt_on_sigterm() -> None:
    """Let SIGTERM end the program as Ctrl-C does, so that `finally` clauses run and workers are stopped."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
