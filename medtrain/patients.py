"""Whose images are whose: `patients.csv` in a data folder, which keeps a patient on one side of every split."""

import csv
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from medtrain.errors import UserError
from medtrain.paths import spelt
from medtrain.wording import shown

NAME = "patients.csv"
# A list of everybody in a large data set is far smaller.
MOST_BYTES = 1 << 28


def read_patients(folder: Path, names: Collection[str], what: str) -> dict[str, int]:
    """The number of each name's patient, from the two columns `what` ("case" or "file") and "patient".

    Numbers follow the sorted names, so that nothing of a patient's own name is kept. Names that the file leaves out are
    not in the answer; without a file it is empty. Raises UserError where the file can not be read, names what is not
    there, or gives a name two patients; it tells the line and never what stands there, which may be somebody's name.
    """
    path = _place(folder)
    if path is None:
        return {}
    owner: dict[str, str] = {}
    for number, name, patient in _rows(path, what):
        if name not in names:
            raise UserError(f"{spelt(path)}, line {number}: what stands under {what} is no {what} of this data set: "
                            f"write it as {shown(min(names), 80)}.")  # fmt: skip
        if owner.setdefault(name, patient) != patient:
            raise UserError(f"{spelt(path)}, line {number}: an earlier line gives this {what} another patient: "
                            "keep one.")  # fmt: skip
    numbers = {patient: n for n, patient in enumerate(dict.fromkeys(owner[name] for name in sorted(owner)))}
    return {name: numbers[patient] for name, patient in owner.items()}


def has_patients(folder: Path) -> bool:
    """Whether there is such a file."""
    return _place(folder) is not None


def _place(folder: Path) -> Path | None:
    """The file in whatever case its name is written, as systems and people differ in it."""
    return next((path for path in sorted(folder.iterdir()) if path.name.lower() == NAME), None)


def owners(ids: Iterable[str], numbers: Mapping[str, int], name_of: Callable[[str], str]) -> dict[str, str]:
    """Whose each id is: ids that `read_patients` or their own names link belong to one patient."""
    root: dict[str, str] = {}

    def first(key: str) -> str:
        while root.setdefault(key, key) != key:
            key = root[key]
        return key

    names = list(ids)
    for name in names:
        if name in numbers:
            root[first(f"name {name_of(name)}")] = first(f"number {numbers[name]}")
    return {name: first(f"name {name_of(name)}") for name in names}


def _rows(path: Path, what: str) -> list[tuple[int, str, str]]:
    """(line, name, patient) of each line; columns may be parted by , ; or tabs, and paths written as Windows does."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{spelt(path)} is larger than {MOST_BYTES >> 20} MB: keep its two columns only.")
        with open(path, newline="", encoding="utf-8-sig") as file:
            head = file.readline()
            parted = max(",;\t", key=head.count)
            names = [name.strip().lower() for name in next(csv.reader([head], delimiter=parted, strict=True), [])]
            lines = csv.DictReader(file, names, delimiter=parted, strict=True)
            # the first line was read before; its own count passes over empty lines
            rows = [(lines.reader.line_num + 1, row) for row in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{spelt(path)} can not be read ({shown(error, 80)}): write it as CSV in UTF-8.") from None
    if not {what, "patient"} <= set(names):
        raise UserError(f"{spelt(path)}, line 1: the columns {what} and patient are needed: name them there.")
    if not rows:
        raise UserError(f"{spelt(path)} names nobody: fill it in, or remove it.")
    for number, row in rows:
        if not (row.get(what) or "").strip() or not (row.get("patient") or "").strip():
            raise UserError(
                f"{spelt(path)}, line {number}: the columns {what} and patient are needed, filled in on every line."
            )
    return [(number, row[what].strip().replace("\\", "/").removeprefix("./"), row["patient"].strip())
            for number, row in rows]  # fmt: skip
