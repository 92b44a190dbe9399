"""Jobs on this machine: their environment, their output, their errors."""

import functools
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medslurm.local import Echo, follow_locally, last_error, own_folder


@pytest.mark.parametrize("devices", [None, "", "GPU-1b2c,3"])
def test_a_job_sees_the_gpus_that_its_submitter_sees(
    devices: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    job = functools.partial(os.getenv, "CUDA_VISIBLE_DEVICES", "unset")
    outcome = follow_locally(job, tmp_path, name="devices")
    assert outcome.ok
    assert outcome.result == ("unset" if devices is None else devices)


def test_output_is_echoed_and_errors_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert follow_locally(functools.partial(print, "hello from the job"), tmp_path / "jobs", name="says").ok
    assert (tmp_path / "jobs").stat().st_mode & 0o777 == 0o700  # it holds pickles
    assert "hello from the job" in capsys.readouterr().out
    outcome = follow_locally(functools.partial(int, "x"), tmp_path, name="fails")
    assert not outcome.ok
    assert outcome.reason == "ValueError: invalid literal for int() with base 10: 'x'"
    assert outcome.log.is_file()


def test_a_folder_of_pickles_is_its_owners_alone(tmp_path: Path) -> None:
    """Nor can others rename it, and put another in its place; a link is not taken."""
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    sweep.chmod(0o2775)
    own_folder(sweep / "jobs")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (sweep, sweep / "jobs")] == [0o2755, 0o700]
    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    (sweep / "code").symlink_to(other)
    with pytest.raises(PermissionError):
        own_folder(sweep / "code")
    assert stat.S_IMODE(other.stat().st_mode) == 0o755


def test_the_last_error_is_found_above_what_submitit_adds() -> None:
    text = "Traceback\n  x\nKeyError: 'a'\n\nDuring\n\nmedtrain.errors.UserError: no: do.\n\nYou can check\n - /log"
    assert last_error(text) == "no: do."  # ours are sentences
    assert last_error("Traceback\n  x\nKeyError: 'a'\n") == "KeyError: 'a'"
    assert last_error("nothing") == ""


def test_echo_prints_whole_lines_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    echo = Echo(log)
    echo.more()
    log.write_text("a\nb")
    echo.more()
    log.write_text("a\nb and more\nsubmitit INFO x\n")
    echo.more()
    assert capsys.readouterr().out == "a\nb and more\n"


def test_an_interrupted_job_shows_no_traceback(tmp_path: Path) -> None:
    """Only what the program itself says is seen; submitit's controller writes into its own log."""
    code = (
        "import functools, sys, time; from pathlib import Path; from medslurm.local import follow_locally\n"
        "from medtrain.processes import end_on_signals; end_on_signals()\n"
        "follow_locally(functools.partial(time.sleep, 60), Path(sys.argv[1]), name='sleeps')"
    )
    process = subprocess.Popen([sys.executable, "-c", f"try:\n    {code.replace(chr(10), chr(10) + '    ')}\n"
                                "except KeyboardInterrupt:\n    sys.exit(130)", str(tmp_path)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "== sleeps\n"
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error == ""
    assert "KeyboardInterrupt" in (tmp_path / "sleeps" / "controller.log").read_text()
