"""A lock on a folder that several machines see: one writer, told by name, and a dead one's lock is recognised."""

import getpass
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from medtrain.errors import UserError
from medtrain.files import beside, parse_json
from medtrain.wording import shown

NAME = "lock.json"
BEAT_S, STALE_S = 20.0, 120.0
# How long a lock of another machine is watched before it is taken over.
WATCH_BEATS = 1.5
# Long enough for the lock of a job that was killed on another node to become stale.
PATIENCE_S = 180.0


class InUseError(UserError):
    """Another process holds the lock, and lives."""


@contextmanager
def locked(folder: Path, doing: str, patience_s: float = 0) -> Iterator[None]:
    """Hold the lock of a folder while `doing` something; raises InUseError that names the holder.

    A lock is stale where its process is dead on this machine, or where its owner elsewhere has not touched it for two
    minutes; a stale one is taken over. One that is held elsewhere is waited for `patience_s`: its owner may have been
    killed a moment ago, as when a job starts again on another node. One of the same SLURM job is of this work before
    it was requeued, and is taken over once it is seen not to be touched.
    """
    fresh = not folder.exists()
    path, ticket = folder / NAME, os.environ.get("SLURM_JOB_ID", "")
    text = json.dumps({
        "host": socket.gethostname(), "space": _space(), "pid": os.getpid(), "started": _started(os.getpid()),
        "user": _user(), "doing": doing, "since": time.time(), "ticket": ticket, "id": secrets.token_hex(8),
    })  # fmt: skip
    _take(path, text, patience_s, ticket)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, ended, text), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        if _is_own(path, text):
            path.unlink(missing_ok=True)
        if fresh and folder.is_dir() and not any(folder.iterdir()):  # nothing came of it
            folder.rmdir()


def _take(path: Path, text: str, patience_s: float, ticket: str) -> None:
    """Make the lock file, in the end; raises UserError."""
    folder, ended_s, tries, told = path.parent, time.monotonic() + patience_s, 0, False
    while tries < 5:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} can not be made ({error.strerror}): give a writable --out.") from None
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            break
        except FileExistsError:
            if patience_s and not told:
                told = _say_wait(folder)
            tries += _removed_stale(path, ended_s, ticket)
        except FileNotFoundError:  # the holder before has just removed the folder
            tries += 1
    else:
        raise UserError(f"{path} can not be taken: another process takes it again and again; try later.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:  # a full disk, of which the library does not say where
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def _say_wait(folder: Path) -> bool:
    """Tell who is waited for, where that is somebody on another machine."""
    held = holder(folder)
    if held and not held["there"]:
        print(f"{folder} is in use by {held['user']} on {held['host']}, or was: waiting for that to end", flush=True)
    return held is not None


def _is_own(path: Path, text: str) -> bool:
    """Whether the lock is still the one that this process made: another may have taken it for stale."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") == text
    except OSError:
        return False


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _beat(path: Path, ended: threading.Event, text: str) -> None:
    while not ended.wait(BEAT_S):
        try:
            there = _content(path)
            if there == text.encode():
                os.utime(path)
            elif there is not None:
                _lost(path)
        except OSError:  # a network file system that does not answer may do so again
            continue


def holder(folder: Path) -> dict[str, Any] | None:
    """Who holds the lock of a folder, or None; `stale` tells whether its owner is dead."""
    path, age = folder / NAME, 0.0
    try:
        age = time.time() - path.stat().st_mtime
        told = parse_json(path)
        told["stale"] = age > STALE_S
        told["there"] = told["host"] == socket.gethostname() and told.get("space", _space()) == _space()
        if told["there"]:
            told["stale"] = not _lives(int(told["pid"]), str(told.get("started", "")))
        return {**told, **{key: shown(told[key], 60) for key in ("host", "user", "doing")}}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        # cut short while it was written, by a process that is no more unless it is very young
        return {"host": "?", "pid": 0, "user": "?", "doing": "?", "there": False, "stale": age > BEAT_S}


def _space() -> str:
    """In which space numbers of processes mean the same: containers on one machine, of one name, have their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """What the kernel tells of a process, from its state on; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _started(pid: int) -> str:
    """When a process was started, in ticks since this machine was, so that a number used again is not taken for it."""
    return next(iter(_stat(pid)[19:20]), "")


def _lives(pid: int, started: str) -> bool:
    about = _stat(pid)
    if about and (about[0] in "ZX" or (started and _started(pid) not in ("", started))):
        return False  # a zombie writes no more
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _touched(path: Path) -> tuple[int, int] | None:
    """Which file it is, and when it was touched last. Opened first, for which network file systems ask the server; what
    they know of a file without, may be a minute old.
    """
    try:
        with open(path, "rb") as file:
            about = os.fstat(file.fileno())
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns


def _lost(path: Path) -> NoReturn:
    """End this process, which was taken for dead: two must not write into a folder."""
    print(f"error: {path} is another process's by now: this one ends", file=sys.stderr, flush=True)
    os._exit(1)


def _removed_stale(path: Path, ended_s: float, ticket: str) -> bool:
    """Remove a stale lock; False where one of another machine was waited for a moment instead."""
    text = _content(path)  # what is judged is what may be taken away
    held = holder(path.parent)
    if held is None or text is None:
        return True
    if ticket and held.get("ticket") == ticket and not held["there"]:
        held["stale"] = True
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
        raise InUseError(
            f"{path.parent} is in use: {held['user']} on {held['host']} (process {held['pid']}) is {held['doing']}; "
            "wait for that to end, or give another --out."
        )
    # renamed first: of two that find it stale only one takes it away, and gives it back if another was quicker
    aside = beside(path)
    try:
        os.rename(path, aside)
        if aside.read_bytes() != text:
            os.link(aside, path)
        aside.unlink()
    except (FileNotFoundError, FileExistsError):
        aside.unlink(missing_ok=True)
    return True
