"""patients.csv: whose images are whose, or one sentence about what is wrong with it."""

from pathlib import Path

import pytest

from medtrain.errors import UserError
from medtrain.patients import owners, read_patients

CASES = {"a", "b", "c", "d"}


def test_without_a_file_nobody_is_known(tmp_path: Path) -> None:
    assert read_patients(tmp_path, CASES, "case") == {}


def test_numbers_stand_for_patients_in_the_order_of_names(tmp_path: Path) -> None:
    text = "\ufeffpatient,age,case\r\nMüller,61,c\r\nJones,48,a\r\nMüller,62,b\r\n"
    (tmp_path / "patients.csv").write_bytes(text.encode())
    assert read_patients(tmp_path, CASES, "case") == {"a": 0, "b": 1, "c": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("patients.csv", "case;patient\na;1\nb;2\n"),
        ("Patients.CSV", "Patient\tCase\n1\ta\n2\tb\n"),
        ("patients.csv", "case, Patient\n.\\a,1\n./b, 2\n"),
    ],
)
def test_other_ways_to_write_it(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert read_patients(tmp_path, CASES, "case") == {"a": 0, "b": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"case,patient\na,1\nz,1\n", "line 3: what stands under case is no case of this data set: write it as a"),
        (b"case,patient\n\na,1\n\n\na,2\n", "line 6: an earlier line gives this case another patient"),
        (b"case,patient\na,1\nb,\n", "line 3: the columns case and patient are needed"),
        (b"file,patient\na,1\n", "line 1: the columns case and patient are needed: name them there"),
        (b"", "line 1: the columns case and patient are needed"),
        (b"case,patient\n", "names nobody: fill it in, or remove it"),
        (b"case,patient\n\xff\xfe,1\n", "can not be read"),
        (b'case,patient\n"a,1\n', "can not be read"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "patients.csv").write_bytes(content)
    with pytest.raises(UserError, match=words) as told:
        read_patients(tmp_path, CASES, "case")
    assert str(told.value).startswith(str(tmp_path / "patients.csv"))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("Doe^Jane,a\nDoe^Jane,b\n", 1),
        ("case,patient\nDoe^Jane,a\n", 2),
        ("case,patient\na,1\n\n\nDoe^Jane,2\n", 5),
        ("case,patient\na,Doe^Jane\na,Doe^John\n", 3),
        ("case,patient\na,Doe^Jane\n,Doe^John\n", 3),
    ],
    ids=["no head", "columns changed over", "after empty lines", "two patients", "a cell without words"],
)
def test_no_cell_is_told(tmp_path: Path, content: str, line: int) -> None:
    (tmp_path / "patients.csv").write_text(content)
    with pytest.raises(UserError, match=f"patients.csv, line {line}: ") as told:
        read_patients(tmp_path, CASES, "case")
    assert "doe^" not in str(told.value).lower()


def test_a_folder_of_that_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "patients.csv").mkdir()
    with pytest.raises(UserError, match="can not be read"):
        read_patients(tmp_path, CASES, "case")


def test_names_and_the_list_together_tell_whose_a_case_is() -> None:
    ids = ["P1-0", "P1-1", "P2-0", "old", "0", "P3-0"]
    found = owners(ids, {"P1-1": 0, "old": 0, "P3-0": 1}, lambda name: name.partition("-")[0])
    assert found["P1-0"] == found["P1-1"] == found["old"]
    assert len(set(found.values())) == 4  # and "0" is not patient number 0
