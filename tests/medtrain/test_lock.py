"""The lock of a sweep folder: one holder, told by name; dead ones are recognised."""

import errno
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from medtrain import lock
from medtrain.errors import UserError
from medtrain.lock import NAME, holder, locked


def write(folder: Path, *, age_s: float = 0.0, **values: object) -> Path:
    path = folder / NAME
    path.write_text(
        json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "user": "me", "doing": "x", **values})
    )
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_it_is_held_and_given_back(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with locked(tmp_path / "new", "testing"):
        held = holder(tmp_path / "new")
        assert held is not None
        assert (held["pid"], held["host"], held["stale"]) == (os.getpid(), socket.gethostname(), False)
        with pytest.raises(UserError, match=f"process {os.getpid()}\\) is testing"), locked(tmp_path / "new", "again"):
            pass
    assert holder(tmp_path / "new") is None
    assert not (tmp_path / "new").exists()
    with locked(tmp_path, "testing"):
        pass
    assert tmp_path.exists()


@pytest.mark.parametrize(
    ("values", "stale"),
    [({"pid": 1}, False), ({"host": "other"}, False), ({"host": "other", "age_s": 200}, True),
     ({"age_s": 200}, False), ({"pid": None}, True)],
)  # fmt: skip
def test_stale_locks_are_recognised_and_taken_over(
    tmp_path: Path, values: dict[str, object], stale: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    chosen = {**values, "pid": dead_pid()} if "pid" in values and values["pid"] is None else values
    write(tmp_path, **chosen)  # type: ignore[arg-type]
    held = holder(tmp_path)
    assert held is not None
    assert held["stale"] is stale
    if stale:
        with locked(tmp_path, "mine"):
            assert json.loads((tmp_path / NAME).read_text())["doing"] == "mine"
    else:
        with pytest.raises(UserError, match="is in use"), locked(tmp_path, "mine"):
            pass
        assert (tmp_path / NAME).exists()


def test_a_lock_cut_short_is_stale_once_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.2)
    path = tmp_path / NAME
    path.write_text("")
    with pytest.raises(UserError), locked(tmp_path, "mine"):
        pass
    os.utime(path, (time.time() - 60,) * 2)
    with locked(tmp_path, "mine"):
        pass


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
def test_a_clock_that_is_set_takes_no_lock_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    """The holder elsewhere touches its lock, but by this clock it seems to be dead since days, or not yet born."""
    monkeypatch.setattr(lock, "BEAT_S", 0.3)
    path, ended, now = write(tmp_path, host="other"), threading.Event(), time.time

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    holder_elsewhere = threading.Thread(target=beat)
    holder_elsewhere.start()
    try:
        monkeypatch.setattr(time, "time", lambda: now() + jump_s)
        with pytest.raises(UserError, match="is in use"), locked(tmp_path, "mine"):
            pass
    finally:
        ended.set()
        holder_elsewhere.join()
    monkeypatch.setattr(time, "time", lambda: now() + 1e6)
    with locked(tmp_path, "mine"):
        assert json.loads(path.read_text())["doing"] == "mine"


def test_one_who_was_killed_elsewhere_a_moment_ago_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    write(tmp_path, host="other")
    with pytest.raises(UserError, match="is in use"), locked(tmp_path, "mine"):
        pass
    with locked(tmp_path, "mine", patience_s=60):
        assert json.loads((tmp_path / NAME).read_text())["doing"] == "mine"


def test_a_process_number_used_again_is_not_the_holder(tmp_path: Path) -> None:
    write(tmp_path, started="12345")
    held = holder(tmp_path)
    assert held is not None
    assert held["stale"] is True
    with locked(tmp_path, "mine"):
        told = holder(tmp_path)
        assert told is not None
        assert told["stale"] is False


def test_the_holder_keeps_it_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    with locked(tmp_path, "mine"):
        os.utime(tmp_path / NAME, (time.time() - 1000,) * 2)
        time.sleep(0.5)
        assert time.time() - (tmp_path / NAME).stat().st_mtime < 100


def take(folder: str, won: "multiprocessing.Queue[int]") -> None:
    try:
        with locked(Path(folder), "racing"):
            won.put(1)
            time.sleep(1.5)
    except UserError:
        won.put(0)


def test_of_many_that_find_a_stale_lock_one_wins(tmp_path: Path) -> None:
    write(tmp_path, pid=dead_pid())
    context = multiprocessing.get_context("fork")
    won = context.Queue()
    racers = [context.Process(target=take, args=(str(tmp_path), won)) for _ in range(6)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(30)
    assert sum(won.get(timeout=5) for _ in racers) == 1


def test_a_process_of_another_container_of_this_name_is_not_told_dead_by_its_number(tmp_path: Path) -> None:
    write(tmp_path, pid=dead_pid(), space="pid:[1]")
    held = holder(tmp_path)
    assert held is not None
    assert (held["there"], held["stale"]) == (False, False)
    write(tmp_path, pid=dead_pid(), space=os.readlink("/proc/self/ns/pid"))
    held = holder(tmp_path)
    assert held is not None
    assert (held["there"], held["stale"]) == (True, True)


def test_a_dead_process_that_its_parent_did_not_bury_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        write(tmp_path, pid=process.pid)
        with pytest.raises(UserError, match="is in use"), locked(tmp_path, "mine"):
            pass
        process.kill()
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        with locked(tmp_path, "mine"):
            pass


@pytest.mark.parametrize("alive", [False, True])
def test_an_earlier_turn_of_the_same_work_is_taken_over_unless_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.3)
    path, ended = write(tmp_path, host="other", ticket="7"), threading.Event()
    holder_elsewhere = threading.Thread(target=lambda: [os.utime(path) for _ in iter(lambda: ended.wait(0.05), True)])
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with pytest.raises(UserError, match="is in use"), locked(tmp_path, "mine"):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if alive:
        holder_elsewhere.start()
    try:
        if alive:
            with pytest.raises(UserError, match="is in use"), locked(tmp_path, "mine"):
                pass
        else:
            with locked(tmp_path, "mine"):
                assert json.loads(path.read_text())["doing"] == "mine"
    finally:
        ended.set()
        if alive:
            holder_elsewhere.join()


TAKEN = """
import sys, time
from pathlib import Path
from medtrain import lock
lock.BEAT_S = 0.05
with lock.locked(Path(sys.argv[1]), "mine"):
    (Path(sys.argv[1]) / lock.NAME).write_text('{"host": "other"}')
    time.sleep(20)
print("went on")
"""


def test_one_whose_lock_another_has_taken_over_ends_and_leaves_it(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TAKEN, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / NAME} is another process's by now: this one ends\n"
    assert json.loads((tmp_path / NAME).read_text()) == {"host": "other"}


def test_a_lock_that_was_taken_over_meanwhile_is_not_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the verdict that it is stale and its removal, another process was quicker."""
    write(tmp_path, pid=dead_pid())
    judge, quicker = lock.holder, []

    def judged(folder: Path) -> dict[str, object] | None:
        held = judge(folder)
        if not quicker:
            quicker.append(write(tmp_path, doing="being quicker", started=lock._started(os.getpid())))
        return held

    monkeypatch.setattr(lock, "holder", judged)
    with pytest.raises(UserError, match="is being quicker"), locked(tmp_path, "mine"):
        pass


def test_a_file_system_that_fails_for_a_moment_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, host="other")
    monkeypatch.setattr(Path, "stat", lambda self: (_ for _ in ()).throw(OSError(errno.ESTALE, "stale")))
    held = holder(tmp_path)
    assert held is not None
    assert held["stale"] is False


def test_who_is_waited_for_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    write(tmp_path, host="other")
    with pytest.raises(UserError, match="is in use"), locked(tmp_path, "mine", patience_s=0.3):
        pass
    assert capsys.readouterr().out == f"{tmp_path} is in use by me on other, or was: waiting for that to end\n"
