"""The code as it was at submission, with its commit and what differed from it."""

import json
import subprocess
from pathlib import Path

from medslurm import snapshot


def git(root: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(["git", "-C", str(root), *who, *words], capture_output=True, text=True, check=True).stdout


def test_a_snapshot_holds_code_commit_and_difference(tmp_path: Path) -> None:
    root = tmp_path / "check out"
    (root / "launch" / "__pycache__").mkdir(parents=True)
    (root / "launch" / "jobs.py").write_text("one = 1\n")
    (root / "launch" / "__pycache__" / "x.pyc").write_text("")
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", "launch/jobs.py")
    git(root, "commit", "-qm", "x")
    (root / "launch" / "jobs.py").write_text("one = 2\n")
    (root / "launch" / "fresh.py").write_text("")
    place = snapshot.take(tmp_path / "code", {"medlaunch": root / "launch"})
    assert (place / "medlaunch" / "jobs.py").read_text() == "one = 2\n"
    assert not (place / "medlaunch" / "__pycache__").exists()
    about = json.loads((place / "snapshot.json").read_text())
    assert about["commit"] == git(root, "rev-parse", "HEAD").strip()
    assert about["changed"]
    assert "launch/fresh.py" in about["new files"]
    assert "+one = 2" in (place / "diff.patch").read_text()
    assert snapshot.take(tmp_path / "code", {"medlaunch": root / "launch"}) != place
    assert not [path for path in (tmp_path / "code").iterdir() if path.name.startswith(".")]


def test_a_folder_without_git_is_told(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    place = snapshot.take(tmp_path / "code", {"medlaunch": tmp_path / "launch"})
    assert json.loads((place / "snapshot.json").read_text())["commit"] == "no git checkout"
