"""A lock on a folder that several machines see: one writer, told by name, and a dead one's lock is recognised."""

import getpass
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medtrain.errors import UserError
from medtrain.files import parse_json
from medtrain.wording import shown

NAME = "lock.json"
BEAT_S, STALE_S = 20.0, 120.0
# How long a lock of another machine is watched before it is taken over.
WATCH_BEATS = 1.5
# Long enough for the lock of a job that was killed on another node to become stale.
PATIENCE_S = 180.0


@contextmanager
def locked(folder: Path, doing: str, patience_s: float = 0) -> Iterator[None]:
    """Hold the lock of a folder while `doing` something; raises UserError that names the holder.

    A lock is stale where its process is dead on this machine, or where its owner elsewhere has not touched it for two
    minutes; a stale one is taken over. One that is held elsewhere is waited for `patience_s`: its owner may have been
    killed a moment ago, as when a job starts again on another node.
    """
    fresh = not folder.exists()
    path = folder / NAME
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "user": _user(),
            "doing": doing, "since": time.time()}  # fmt: skip
    ended_s = time.monotonic() + patience_s
    tries = 0
    while tries < 5:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} can not be made ({error.strerror}): give a writable --out.") from None
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            break
        except FileExistsError:
            tries += _removed_stale(path, ended_s)
        except FileNotFoundError:  # the holder before has just removed the folder
            tries += 1
    else:
        raise UserError(f"{path} can not be taken: another process takes it again and again; try later.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(mine, file)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        path.unlink(missing_ok=True)
        if fresh and folder.is_dir() and not any(folder.iterdir()):  # nothing came of it
            folder.rmdir()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        try:
            os.utime(path)
        except OSError:
            return


def holder(folder: Path) -> dict[str, Any] | None:
    """Who holds the lock of a folder, or None; `stale` tells whether its owner is dead."""
    path = folder / NAME
    try:
        age = time.time() - path.stat().st_mtime
        told = parse_json(path)
        told["stale"] = age > STALE_S
        if told["host"] == socket.gethostname():
            told["stale"] = not _lives(int(told["pid"]), str(told.get("started", "")))
        told["there"] = told["host"] == socket.gethostname()
        return {**told, **{key: shown(told[key], 60) for key in ("host", "user", "doing")}}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        # cut short while it was written, by a process that is no more unless it is very young
        return {"host": "?", "pid": 0, "user": "?", "doing": "?", "there": False, "stale": age > BEAT_S}


def _started(pid: int) -> str:
    """When a process was started, in ticks since this machine was, so that a number used again is not taken for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _lives(pid: int, started: str) -> bool:
    if started and _started(pid) not in ("", started):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _touched(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _removed_stale(path: Path, ended_s: float) -> bool:
    """Remove a stale lock; False where one of another machine was waited for a moment instead."""
    held = holder(path.parent)
    if held is None:
        return True
    if held["stale"] and not held["there"]:
        # by the clock alone, which may have been set: one that is alive touches its lock meanwhile
        before, ended = _touched(path), time.monotonic() + WATCH_BEATS * BEAT_S
        while _touched(path) == before and time.monotonic() < ended:
            time.sleep(BEAT_S / 20)
        held["stale"] = _touched(path) == before
    if not held["stale"] and not held["there"] and time.monotonic() < ended_s:
        time.sleep(BEAT_S / 4)
        return False
    if not held["stale"]:
        raise UserError(
            f"{path.parent} is in use: {held['user']} on {held['host']} (process {held['pid']}) is {held['doing']}; "
            "wait for that to end, or give another --out."
        )
    # renamed first: of two that find it stale only one takes it away, and gives it back if another was quicker
    aside = path.with_name(f".{NAME}.{os.getpid()}")
    try:
        text = path.read_bytes()
        os.rename(path, aside)
        if aside.read_bytes() != text:
            os.link(aside, path)
        aside.unlink()
    except (FileNotFoundError, FileExistsError):
        aside.unlink(missing_ok=True)
    return True
