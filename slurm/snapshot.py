"""A copy of the code beside the jobs: what was submitted runs, whatever happens to the checkout while it waits."""

import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path


def take(folder: Path, packages: Mapping[str, Path]) -> Path:
    """Copy packages (import name -> folder) under `folder`, with snapshot.json (commit, time) and diff.patch; returns
    what PYTHONPATH must hold on the nodes.
    """
    place = folder / time.strftime("%Y%m%d-%H%M%S")
    number = 1
    while place.exists():
        number += 1
        place = place.with_name(f"{place.name.split('.')[0]}.{number}")
    hidden = place.with_name(f".{place.name}")
    hidden.mkdir(parents=True)
    for name, source in packages.items():
        shutil.copytree(source, hidden / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    root = next(iter(packages.values())).parent
    commit = _git(root, "rev-parse", "HEAD").strip()
    diff = _git(root, "diff", "HEAD")
    # intent-to-add would change the index, so new files are named only
    fresh = _git(root, "ls-files", "--others", "--exclude-standard").splitlines()
    about = {"commit": commit or "no git checkout", "changed": bool(diff or fresh), "new files": fresh,
             "from": str(root), "taken": time.strftime("%Y-%m-%d %H:%M:%S")}  # fmt: skip
    (hidden / "snapshot.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (hidden / "diff.patch").write_text(diff, encoding="utf-8")
    hidden.rename(place)
    return place


def _git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=60, check=False,
                              errors="replace")  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
