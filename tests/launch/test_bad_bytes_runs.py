"""Damaged and hostile sweep folders and run folders: one sentence that names the file, exit code 2, no table."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
from hostile import nested
from launch_helpers import check_refused, run_main

Change = Callable[[Path], object]


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file's value in place, or put what `change` returns."""
    value = json.loads(path.read_text())
    other = change(value)
    path.write_text(json.dumps(value if other is None else other))


def rewrite_text(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def text(content: str | bytes) -> Change:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def field(*keys: Any, value: Any) -> Change:
    """Another value somewhere in a JSON file."""

    def apply(there: Any) -> None:
        for key in keys[:-1]:
            there = there[key]
        there[keys[-1]] = value

    return lambda path: rewrite(path, apply)


ANY_JSON: dict[str, Change] = {
    "empty": text(""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "not UTF-8": text(b'{"a": "\xff"}'),
    "a list": text("[]"),
    "null": text("null"),
    "nested": text(nested(99999)),
    "200 MB": lambda path: os.truncate(path, 200 << 20),
    "half a character": text('{"part": "\\ud800"}'),
}
MEMBER = ("members", 0)
PLANS: dict[str, Change] = ANY_JSON | {
    "no members": lambda path: rewrite(path, lambda plan: {k: v for k, v in plan.items() if k != "members"}),
    "members a text": field("members", value="abc"),
    "another task": field("task", value="other"),
    "task a list": field("task", value=[]),
    "a folder above": field(*MEMBER, "folder", value=".."),
    "a folder elsewhere": field(*MEMBER, "folder", value="../other"),
    "an absolute folder": field(*MEMBER, "folder", value="/tmp"),
    "a folder that is a number": field(*MEMBER, "folder", value=3),
    "a label of two lines": field(*MEMBER, "label", value="a\nb"),
    "a label that is a list": field(*MEMBER, "label", value=["a"]),
    "settings a text": field(*MEMBER, "settings", value="abc"),
    "no recipe": field(*MEMBER, "recipe", value=None),
    "a cache elsewhere": field("cache", value="/etc/passwd"),
    "a cache above": field("cache", value="../cache.h5"),
    "seeds a text": field("request", "seeds", value="many"),
    "an unknown request": field("request", "colour", value="red"),
    "the same member twice": lambda path: rewrite(path, lambda plan: plan["members"].append(plan["members"][0])),
}


@pytest.mark.parametrize("program", ["status", "finish"])
@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str, program: str, copy: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    sweep = copy("brats")
    PLANS[name](sweep / "plan.json")
    before = sorted(sweep.rglob("*"))
    code = run_main(program, sweep)
    check_refused(code, capfd.readouterr().err, str(sweep / "plan.json"), "damaged", sweep / "none")
    assert sorted(sweep.rglob("*")) == before


def test_a_member_that_is_a_link_out_of_the_sweep(
    copy: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = copy("brats")
    (sweep / "member").rename(tmp_path / "elsewhere")
    (sweep / "member").symlink_to(tmp_path / "elsewhere")
    for program in ("status", "finish"):
        told = "a link that leaves the sweep's folder"
        check_refused(run_main(program, sweep), capfd.readouterr().err, str(sweep / "member"), told, tmp_path / "none")
    monkeypatch.setenv("MEDTRAIN_FOLLOW_LINKS", "1")
    assert run_main("status", sweep) == 0


JOBS: dict[str, Change] = {
    "empty": text(""),
    "another head": text("a,b\n1,2\n"),
    "too few cells": text("kind,job,folder,log,code\ntrain,7\n"),
    "not UTF-8": text(b"kind,job,folder,log,code\ntrain,7,\xff,,\n"),
    "a zero byte": text("kind,job,folder,log,code\ntrain,7,\0,,\n"),
    "a cell of a megabyte": text(f"kind,job,folder,log,code\ntrain,7,{'x' * (1 << 20)},,\n"),
    "an option where a job belongs": text("kind,job,folder,log,code\ntrain,--help,member,,\n"),
    "a job of two words": text("kind,job,folder,log,code\ntrain,7 8,member,,\n"),
}


@pytest.mark.parametrize("name", JOBS)
def test_jobs(name: str, copy: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    sweep = copy("brats")
    JOBS[name](sweep / "jobs.csv")
    code = run_main("status", sweep, "--files-only")
    check_refused(code, capfd.readouterr().err, str(sweep / "jobs.csv"), "damaged", sweep / "none")


def column(name: str, value: str) -> Change:
    """Another value in every line of a table of rows."""

    def change(content: str) -> str:
        head, *lines = (line.split(",") for line in content.splitlines())
        at = head.index(name)
        return "\n".join(",".join(cells) for cells in [head, *([*c[:at], value, *c[at + 1 :]] for c in lines)]) + "\n"

    return lambda path: rewrite_text(path, change)


ROWS: dict[str, Change] = {
    "empty": text(""),
    "another table": text("a,b,c,d\n1,2,3,x\n"),
    "not UTF-8": text(b"member,case,part\n\xff\n"),
    "a zero byte": text("member,case,part,mean\na,b,\0,1\n"),
    "a line cut short": lambda path: rewrite_text(path, lambda t: t[:-15]),
    "twice the same line": lambda path: rewrite_text(path, lambda t: t + t.splitlines()[-1] + "\n"),
}
SCAN_ROWS = ROWS | {
    "NaN": column("mean", "nan"),
    "a column is missing": lambda path: rewrite_text(path, lambda t: t.replace("ET", "XX")),
    "an unknown case": column("case", "NOBODY"),
}
IMAGE_ROWS = ROWS | {
    "a class that is not there": column("target", "9"),
    "a class of a fraction": column("target", "0.5"),
    "a probability of 7": column("p:oral_scc", "7"),
    "classes of another cancer": lambda path: rewrite_text(path, lambda t: t.replace("p:oral", "p:brain")),
    "no validation": column("part", "test"),
}
DONE = ANY_JSON | {
    "part missing": text('{"label_map": "msd", "epochs": 1}'),
    "epochs a text": text('{"label_map": "msd", "epochs": "x", "part": "val"}'),
    "labels a list": text('{"label_map": [], "epochs": 1, "part": "val"}'),
}


def _finishes(change: Change, path: Path, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    sweep = path.parents[1]
    change(path)
    check_refused(run_main("finish", sweep), capfd.readouterr().err, str(path), words, sweep / "figures")
    assert not list(sweep.glob("table.*"))


@pytest.mark.parametrize("name", SCAN_ROWS)
def test_rows_of_scans(name: str, copy: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    path = copy("brats") / "member" / "cases.csv"
    _finishes(SCAN_ROWS[name], path, "not a table|has not|damaged", capfd)


@pytest.mark.parametrize("name", IMAGE_ROWS)
def test_rows_of_images(name: str, copy: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    _finishes(IMAGE_ROWS[name], copy("multicancer") / "member" / "cases.csv", "not a table|does not fit", capfd)


@pytest.mark.parametrize("name", DONE)
def test_last_words(name: str, copy: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    _finishes(DONE[name], copy("brats") / "member" / "done.json", "damaged", capfd)


@pytest.mark.parametrize("name", ANY_JSON)
def test_what_a_run_was_trained_on(name: str, copy: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    path = copy("brats") / "member" / "cache.json"
    ANY_JSON[name](path)
    code = run_main("finish", path.parents[1])
    check_refused(code, capfd.readouterr().err, "member", "damaged|other data", path.parents[1] / "figures")


@pytest.mark.parametrize("name", ANY_JSON)
def test_status_goes_on_beside_a_damaged_member(
    name: str, copy: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    member = copy("brats") / "member"
    for file in ("done.json", "status.json", "job.json", "failed.json"):
        shutil.copy(member / "done.json", member / f"{file}.tmp")
        (member / f"{file}.tmp").rename(member / file)
        ANY_JSON[name](member / file)
    assert run_main("status", member.parent, "--files-only") == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert "1 damaged" in printed.out


def test_the_caches_of_a_sweep_may_be_read_only(copy: Callable[[str], Path]) -> None:
    sweep = copy("brats")
    (sweep / "cache.h5").chmod(0o400)
    with h5py.File(sweep / "cache.h5", locking=False) as file:
        assert len(file["cases"]) == 5
    assert run_main("finish", sweep) == 0
