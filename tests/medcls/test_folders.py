"""Layouts that are read, and those that are refused in one sentence."""

import shutil
from pathlib import Path

import pytest

from medcls.folders import PUBLISHED, read_folders
from medtrain.errors import UserError


def make(root: Path, *names: str, files: int = 2) -> Path:
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for n in range(files):
            (root / name / f"{n}.jpg").write_bytes(b"x")
    return root


def test_the_published_layout_with_its_26_classes(tmp_path: Path) -> None:
    names = [f"{cancer}/{name}" for cancer, classes in PUBLISHED.items() for name in classes]
    data = read_folders(make(tmp_path, *names))
    assert len(data.classes) == 26
    assert len(dict(data.classes)) == 8
    assert [f"{cancer}/{name}" for cancer, name in data.classes] == names
    assert len(data.files) == 52
    assert data.notes == ()
    path, number = data.files[0]
    assert data.classes[number] == tuple(path.split("/")[:2])


def test_nested_once_more_as_the_zip_unpacks(tmp_path: Path) -> None:
    make(tmp_path / "Multi Cancer" / "Multi Cancer", "Brain Cancer/brain_glioma", "Brain Cancer/brain_menin")
    data = read_folders(tmp_path)
    assert data.root == tmp_path / "Multi Cancer" / "Multi Cancer"
    assert data.files[0][0] == "Brain Cancer/brain_glioma/0.jpg"
    assert "missing: brain_tumor" in data.notes[0]


def test_any_folder_of_class_folders(tmp_path: Path) -> None:
    data = read_folders(make(tmp_path / "moles", "good", "bad"))
    assert data.classes == (("moles", "bad"), ("moles", "good"))
    assert data.files[0] == ("bad/0.jpg", 0)


def test_unknown_classes_are_taken_and_told(tmp_path: Path) -> None:
    data = read_folders(make(tmp_path, "Oral Cancer/oral_scc", "Oral Cancer/oral_odd", "Other/a", "Other/b"))
    assert [name for _, name in data.classes] == ["oral_scc", "oral_odd", "a", "b"]
    assert any("unknown to the published set: oral_odd" in note for note in data.notes)
    assert any("missing: oral_normal" in note for note in data.notes)


def test_litter_is_no_image(tmp_path: Path) -> None:
    make(tmp_path, "d/a", "d/b", "d/__MACOSX", ".git/x")
    (tmp_path / "d" / "a" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "d" / "a" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "d" / "a" / "Icon\r").write_bytes(b"x")
    make(tmp_path, "d/a/@eaDir", "d/$RECYCLE.BIN")
    (tmp_path / "d" / "a" / "notes.txt").write_bytes(b"x")  # may be anything: it is examined and set aside by name
    assert [path for path, _ in read_folders(tmp_path / "d").files] == [
        "a/0.jpg", "a/1.jpg", "a/notes.txt", "b/0.jpg", "b/1.jpg",
    ]  # fmt: skip


def test_nothing_is_dropped_silently(tmp_path: Path) -> None:
    make(tmp_path, "X/a", "X/b", "Y/a", "Y/b")
    (tmp_path / "X" / "stray.jpg").write_bytes(b"x")
    (tmp_path / "readme.txt").write_bytes(b"x")
    (tmp_path / "X" / "a" / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    data = read_folders(tmp_path)
    assert any(note.startswith("2 files lie beside the class folders") for note in data.notes)
    assert "X/a/broken.jpg" in dict(data.files)
    (tmp_path / "X" / "a" / "bad\udce9.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="not UTF-8"):
        read_folders(tmp_path)


def test_what_was_found_in_words(tmp_path: Path) -> None:
    make(tmp_path, "X/a", "X/b", "Y/c", "Y/d")
    assert read_folders(tmp_path).in_words() == "X (a, b); Y (c, d)"


@pytest.mark.parametrize("inner", ["", "Multi Cancer"])
def test_a_lone_link_out_of_the_folder_is_not_its_root(
    tmp_path: Path, inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "private" / inner, "Oral Cancer/oral_scc", "Oral Cancer/oral_normal")
    data = tmp_path / "data"
    data.mkdir()
    (data / "link").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="data/link is a link that leaves the data folder"):
        read_folders(data)
    monkeypatch.setenv("MEDTRAIN_FOLLOW_LINKS", "1")
    assert len(read_folders(data).files) == 4


def test_links_that_stay_are_read(tmp_path: Path) -> None:
    make(tmp_path / "data" / ".store", "b")
    make(tmp_path / "data" / "set", "a")
    (tmp_path / "data" / "set" / "b").symlink_to(tmp_path / "data" / ".store" / "b")
    (tmp_path / "named").symlink_to(tmp_path / "data")  # by the user
    files = [path for path, _ in read_folders(tmp_path / "named").files]
    assert files == ["set/a/0.jpg", "set/a/1.jpg", "set/b/0.jpg", "set/b/1.jpg"]


@pytest.mark.parametrize("place", ["X/=cmd()/0.jpg", "@X/a/0.jpg", "X/a/+1.jpg", "X/=stray.jpg"])
def test_names_that_are_formulas_to_a_spreadsheet_are_refused(tmp_path: Path, place: str) -> None:
    make(tmp_path, "X/a", "X/b", "Y/-a", "Y/1")
    read_folders(tmp_path)
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes(b"x")
    with pytest.raises(UserError, match=r"that spreadsheets take for a formula .*: rename it"):
        read_folders(tmp_path)
    with pytest.raises(UserError, match="that spreadsheets take for a formula"):
        read_folders(make(tmp_path / "=moles", "a", "b"))


def test_folders_that_would_steer_a_terminal_are_told_in_plain_signs(tmp_path: Path) -> None:
    place = tmp_path / "x\x1b[31m"
    make(place, "c/only")
    make(place / "halves", "train", "test")
    for folder in (place, place / "halves", place / "absent", place / "c" / "only"):
        with pytest.raises(UserError, match=r"x\\x1b\[31m") as told:
            read_folders(folder)
        assert str(told.value).isprintable()


def test_refusals(tmp_path: Path) -> None:
    make(tmp_path / "one", "c/only")
    make(tmp_path / "empty", "c/a", "c/b")
    shutil.rmtree(tmp_path / "empty" / "c" / "b")
    (tmp_path / "empty" / "c" / "b").mkdir()
    make(tmp_path / "deep", "x/y/z/w", "v/y/z/w")
    make(tmp_path / "uneven", "x/y", "x/z", "flat")
    make(tmp_path / "kaggle", "Training/a", "Training/b", "Testing/a", "Testing/b")
    make(tmp_path / "halves", "train", "test")
    make(tmp_path / "masked", "x/images", "x/masks", "y/images", "y/masks")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("x")
    for name, words in [
        ("one", "one class only (only)"), ("empty", "b is empty"), ("deep", "nested too deep"),
        ("uneven", "flat has no class folders"), ("nothing", "holds no class folders"), ("file", "is not a folder"),
        ("absent", "is not a folder"), ("kaggle", "is sorted into Testing and Training, which are no classes"),
        ("halves", "is sorted into test and train, which are no classes"),
        ("masked", "x holds images and masks, which are no classes"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")) as caught:
            read_folders(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
