"""Paths in data folders: links out of them are not gone into, and what stands in a message steers no terminal."""

import os
from pathlib import Path

import pytest

from medtrain.aside import report, within
from medtrain.errors import UserError
from medtrain.paths import spelt, walk_files


def test_a_link_that_leaves_is_refused_before_anything_behind_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, private = tmp_path / "data", tmp_path / "private"
    (data / "b").mkdir(parents=True)
    private.mkdir()
    (private / "x.nii.gz").write_bytes(b"x")
    (data / "b" / "link").symlink_to(private)
    looked, real = list[str](), os.scandir

    def noted(place: str) -> object:
        looked.append(os.path.realpath(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", noted)
    with pytest.raises(UserError, match="data/b/link is a link that leaves the data folder"):
        list(walk_files(data, lambda name: False))
    assert looked == [str(data), str(data / "b")]
    assert list(walk_files(data, lambda name: name == "link")) == []
    wanted = [data / "b" / "link" / "x.nii.gz"]
    assert list(walk_files(data, lambda name: False, anywhere=True)) == wanted
    monkeypatch.setenv("MEDTRAIN_FOLLOW_LINKS", "1")
    assert list(walk_files(data, lambda name: False)) == wanted


def test_a_path_is_spelt_whole_and_in_one_line() -> None:
    path = Path("/data") / ("x" * 200) / "a\x1b[31m\nb"
    assert spelt(path) == f"/data/{'x' * 200}/a\\x1b[31m\\nb"


ROOT = Path("/home/who/Doe_Jane_MRN123456/Task01")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (f"{ROOT}/labelsTr/a.nii.gz is cut short: copy it again.", "labelsTr/a.nii.gz is cut short: copy it again."),
        (f"{ROOT} has no T1Gd file: add it.", "the data folder has no T1Gd file: add it."),
        (f"no case of {ROOT}; the first: '{ROOT}/a b/c'", "no case of the data folder; the first: 'a b/c'"),
        (f"{ROOT}2/a is not there.", f"{ROOT}2/a is not there."),
        ("case a has voxels of 3 mm.", "case a has voxels of 3 mm."),
    ],
)
def test_paths_are_told_within_the_data_folder(words: str, wanted: str) -> None:
    assert within(words, ROOT) == wanted


def test_a_folder_that_is_named_from_where_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Doe" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "Doe")
    for root in (Path("data"), Path("../Doe/data"), Path("data/")):
        told = within(f"{root}/a is bad: export the data again; {tmp_path}/Doe/data/b too.", root)
        assert told == "a is bad: export the data again; b too."
    assert within("a/b is bad. Or not: ...", Path()) == "a/b is bad. Or not: ..."


def test_neither_the_list_nor_the_terminal_tells_the_folders_around(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aside = [("a", f"{ROOT}/a.nii.gz is\ncut  short."), ("b", f"{ROOT}/=1+1/b.nii.gz is empty.")]
    report(aside, tmp_path / "c.csv", "case", root=ROOT)
    listed = (tmp_path / "c.csv").read_text()
    assert listed == "case,reason\na,a.nii.gz is cut short.\nb,./=1+1/b.nii.gz is empty.\n"
    assert capsys.readouterr().err.startswith("set aside: a: a.nii.gz is cut short.\n")
