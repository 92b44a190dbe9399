"""Whose label maps lie in a folder."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from medseg.claim import NAME, claimed
from medtrain.errors import UserError


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "done.json").write_text(json.dumps({"scores": {"mean": name}}))
    return [tmp_path / "a", tmp_path / "b"]


def test_other_members_are_refused_also_while_the_first_call_runs(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claimed(out, runs, [1.0, 1.0]):
        for others, weights in ((runs[:1], [1.0]), (runs, [1.0, 2.0]), (runs[::-1], [1.0, 1.0])):
            with pytest.raises(UserError, match=r"holds label maps of other members .* another --out"), \
                    claimed(out, others, weights):  # fmt: skip
                pass
        with claimed(out, runs, [1.0, 1.0]):  # other scans of the same members
            (out / "case.nii.gz").write_bytes(b"")
    assert json.loads((out / NAME).read_text())["members"] == ["a", "b"]
    (runs[0] / "done.json").write_text(json.dumps({"scores": {"mean": "another training"}}))
    with pytest.raises(UserError, match="other members"), claimed(out, runs, [1.0, 1.0]):
        pass


def test_a_run_that_was_moved_stays_itself(runs: list[Path], tmp_path: Path) -> None:
    with claimed(tmp_path / "out", runs[:1], [1.0]):
        (tmp_path / "out" / "case.nii.gz").write_bytes(b"")
    elsewhere = shutil.copytree(runs[0], tmp_path / "elsewhere" / "a", copy_function=shutil.copyfile)
    with claimed(tmp_path / "out", [elsewhere], [1.0]):
        pass


def test_nothing_is_claimed_where_nothing_was_made(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scan"), claimed(tmp_path / "out", runs, [1.0, 1.0]):
        raise ValueError("no scan can be read")
    assert not (tmp_path / "out").exists()
    (tmp_path / "own").mkdir()
    with claimed(tmp_path / "own", runs, [1.0, 1.0]):
        pass
    assert list((tmp_path / "own").iterdir()) == []


def test_without_hard_links(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    with claimed(tmp_path / "out", runs, [1.0, 1.0]):
        (tmp_path / "out" / "case.nii.gz").write_bytes(b"")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["case.nii.gz", NAME]
    with pytest.raises(UserError, match="other members"), claimed(tmp_path / "out", runs[:1], [1.0]):
        pass
