"""The environment that the shell scripts make: once, with all extras, never another checkout's; pip is a stand-in."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from launch_helpers import ROOT

PYTHON = """#!/usr/bin/env bash
case "$*" in
-c*) exit 0 ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && : >"$3/bin/activate" ;;
"-m pip "*) [ ! -e "$HOME/no_internet" ] && printf '%s\\n' "$*" >>"$HOME/pip.txt" ;;
esac
"""


class Checkout:
    """A checkout's scripts, a home, and a Python that only writes down what pip is asked for."""

    def __init__(self, root: Path, home: Path):
        self.root, self.home = root, home
        (root / "slurm").mkdir(parents=True)
        (home / "bin").mkdir(parents=True, exist_ok=True)
        for name in ("slurm/env.sh", "slurm/install.sh", "constraints.txt", "setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, root / name)
        for name in ("python3.11", "python"):
            (home / "bin" / name).write_text(PYTHON)
            (home / "bin" / name).chmod(0o755)

    def install(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """`bash slurm/install.sh`."""
        return self.shell(f"bash {self.root}/slurm/install.sh", **environment)

    def shell(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A script with nobody's own settings."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MEDTRAIN_", "SLURM_"))}
        paths = {"PATH": f"{self.home / 'bin'}:{os.environ['PATH']}", "HOME": str(self.home), "VIRTUAL_ENV": "here"}
        return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False,
                              env={**kept, **paths, **environment})  # fmt: skip

    def asked(self) -> list[str]:
        """The packages of each call of pip."""
        lines = (self.home / "pip.txt").read_text().splitlines()
        return [line.split(" -e ")[1] for line in lines]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "one", tmp_path / "home")


def test_it_is_installed_once_and_extras_stay(checkout: Checkout) -> None:
    assert "installing into" in checkout.install(MEDTRAIN_EXTRAS="test").stdout
    assert checkout.install().stdout == "ready: . here/bin/activate\n"
    checkout.install(MEDTRAIN_EXTRAS="bench,test")
    with (checkout.root / "constraints.txt").open("a") as file:
        file.write("# another version\n")
    checkout.install()
    root = checkout.root
    assert checkout.asked() == [f"{root}[test]", f"{root}[bench,test]", f"{root}[bench,test]"]


def test_what_is_there_is_used_without_a_lock(checkout: Checkout) -> None:
    """A colleague may use it, who may not write there."""
    checkout.install()
    lock = checkout.root / ".venv.lock"
    lock.unlink()
    assert checkout.install().returncode == 0
    assert not lock.exists()


def test_an_environment_that_jobs_may_use_is_renewed_by_install_alone(checkout: Checkout) -> None:
    checkout.install()
    with (checkout.root / "constraints.txt").open("a") as file:
        file.write("# another version\n")
    job = f". {checkout.root}/slurm/env.sh; medtrain_env {checkout.root}"
    done = checkout.shell(job)
    assert done.returncode == 2
    assert "run 'bash slurm/install.sh' once none does" in done.stderr
    assert checkout.install().returncode == 0
    assert checkout.shell(job).returncode == 0
    assert len(checkout.asked()) == 2


def test_an_installation_that_was_cut_off_is_not_taken_for_whole(checkout: Checkout) -> None:
    """Neither by the version before, to which the checkout may have gone back."""
    before = (checkout.root / "constraints.txt").read_text()
    checkout.install(MEDTRAIN_EXTRAS="test")
    (checkout.root / "constraints.txt").write_text(before + "# another version\n")
    (checkout.home / "no_internet").touch()
    assert checkout.install().returncode != 0
    (checkout.root / "constraints.txt").write_text(before)
    (checkout.home / "no_internet").unlink()
    assert "installing into" in checkout.install().stdout
    assert checkout.asked() == [f"{checkout.root}[test]"] * 2


def test_without_flock_a_folder_is_the_lock(checkout: Checkout) -> None:
    flock = checkout.home / "bin" / "flock"
    flock.write_text("#!/bin/sh\nexit 1\n")
    flock.chmod(0o755)
    lock = checkout.root / ".venv.installing"
    lock.mkdir()
    done = checkout.install(MEDTRAIN_WAIT_S="0")
    assert done.returncode == 2
    assert f"remove the folder {lock} if none does" in done.stderr
    lock.rmdir()
    (checkout.home / "no_internet").touch()
    assert checkout.install().returncode != 0
    assert not lock.exists()  # also of one that failed
    (checkout.home / "no_internet").unlink()
    assert checkout.install().returncode == 0
    assert not lock.exists()


def test_another_checkouts_environment_is_left_alone(checkout: Checkout, tmp_path: Path) -> None:
    shared = str(tmp_path / "shared")
    assert checkout.install(MEDTRAIN_VENV=shared).returncode == 0
    other = Checkout(tmp_path / "two", tmp_path / "home")
    done = other.install(MEDTRAIN_VENV=shared)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {shared} is the environment of {checkout.root}: ")
    shutil.rmtree(checkout.root)  # it has moved away
    assert other.install(MEDTRAIN_VENV=shared).returncode == 0
    assert checkout.asked() == [str(checkout.root), str(other.root)]


def test_a_node_without_internet_names_the_remedy(checkout: Checkout) -> None:
    checkout.home.joinpath("no_internet").touch()
    done = checkout.install(SLURM_JOB_ID="7")
    assert done.returncode == 1
    assert "run 'bash slurm/install.sh' on a login node first" in done.stderr
    assert checkout.install().stderr == ""  # pip's own words are enough elsewhere


def test_options_are_refused_and_help_is_told() -> None:
    script = str(ROOT / "slurm" / "install.sh")
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=True)
    assert "bash slurm/install.sh" in done.stdout
    assert subprocess.run(["bash", script, "--all"], capture_output=True, check=False).returncode == 2
