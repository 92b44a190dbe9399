"""Parts of a cache: only this user's own files are taken for some."""

import os
import stat
from pathlib import Path

import pytest

from medtrain import preparing
from medtrain.errors import UserError
from medtrain.preparing import make_once, parts_of


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A cache that is not there, with a part of an earlier call."""
    parts_of(tmp_path / "c.h5").mkdir()
    (parts_of(tmp_path / "c.h5") / "a.h5").write_text("mine")
    return tmp_path / "c.h5"


def made(out: Path) -> list[int]:
    """The modes of the parts' folder while the cache is made."""
    seen: list[int] = []
    make_once(out, lambda: False, lambda: seen.append(stat.S_IMODE(parts_of(out).stat().st_mode)))
    return seen


def test_only_the_user_may_put_parts_there(out: Path, tmp_path: Path) -> None:
    parts_of(out).chmod(0o777)
    assert made(out) == [0o700]
    assert not parts_of(out).exists()
    assert made(tmp_path / "new" / "d.h5") == [0o700]


def test_a_folder_of_parts_that_is_a_link_is_refused(out: Path, tmp_path: Path) -> None:
    parts_of(out).rename(tmp_path / "private")
    parts_of(out).symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match=r"c\.h5\.parts is a link, .*: remove it"):
        made(out)
    assert [path.name for path in (tmp_path / "private").iterdir()] == ["a.h5"]  # no lock was written into it


@pytest.mark.parametrize("target", ["private.h5", "nowhere.h5"])
def test_a_part_that_is_a_link_is_refused(out: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "private.h5").write_text("private")
    (parts_of(out) / "b.h5").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=r"c\.h5\.parts/b\.h5 is a link, .*: remove it"):
        made(out)
    assert (parts_of(out) / "a.h5").exists()


@pytest.mark.parametrize("name", ["", "a.h5"])
def test_what_is_another_users_is_refused(out: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = parts_of(out) / name
    real = preparing._about

    def about(path: Path) -> os.stat_result | None:
        told = real(path)
        if told is None or path != other:
            return told
        return os.stat_result([*told[:4], os.getuid() + 1, *told[5:10]])

    monkeypatch.setattr(preparing, "_about", about)
    with pytest.raises(UserError, match=r"belongs to another user: .* remove it, or give another --out") as told:
        made(out)
    assert str(told.value).startswith(f"{other} ")
    assert (parts_of(out) / "a.h5").exists()


def test_what_another_put_there_while_the_lock_was_taken_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = preparing.locked

    def slow(parts: Path, *rest: object) -> object:
        (parts / "b.h5").symlink_to("/etc/passwd")
        return real(parts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(preparing, "locked", slow)
    with pytest.raises(UserError, match="is a link"):
        made(out)


def test_a_disk_that_gives_all_files_to_one_number_is_none_of_another_user(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getuid", lambda: 4711)
    assert made(out) == [0o700]
