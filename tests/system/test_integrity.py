"""Caches whose bytes changed, that are being written, that may only be read, or that two programs want to write."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import TINY, TINY_IMAGES
from fuzz_readers import image_cache as tiny_images
from fuzz_readers import volume_cache as tiny_volumes
from hostile import IMAGE, brats_folder, msd_folder, nifti, scan
from launch_helpers import ROOT, in_this_process, run_main

from medcls.cache import ImageCache, Images, write_images
from medseg import cache as volumes
from medseg.cache import Cache
from medseg.preparation import Preparation, prepare_dataset
from medtrain.errors import UserError
from medtrain.lock import locked

CASE = "PHANTOM_000"
ARRAYS = ("image", "label", "label_native", "voxels_1")


def train(recipe: str, settings: tuple[str, ...], cache: Path, out: Path) -> int:
    sets = [part for item in settings for part in ("--set", item)]
    return run_main("train", recipe, "--cache", cache, "--out", out, *sets)


def everything(path: Path) -> list[Any]:
    """All that a cache tells, and whether `verify` calls it intact; one word where it can not be opened."""
    try:
        opened = Cache(path) if b"volume" in path.read_bytes() else ImageCache(path)
        intact = all(fine for _, fine in opened.verify())
        if isinstance(opened, Cache):
            arrays = [opened.read(case, name) for case in opened.ids for name in ARRAYS]
            told: list[Any] = [opened.labels, opened.channels, opened.preparation, opened.spacing_mm, opened.origin]
            told += [opened.facts(case) for case in opened.ids] + [opened.fingerprint]
        else:
            arrays = [opened.target, opened.group, opened.size, opened.histogram]
            arrays += [opened.encoded(n) for n in range(len(opened.ids))]
            told = [opened.classes, opened.preparation, opened.facts, opened.fingerprint, opened.origin]
        opened.close()
        return [intact, opened.ids, told, [array.tobytes() for array in arrays]]
    except UserError:
        return ["refused"]


@pytest.mark.parametrize("make", [tiny_volumes, tiny_images])
def test_no_flipped_byte_passes_for_what_was_written(make: Callable[[Path], list[bytes]], tmp_path: Path) -> None:
    """Whatever is read from a cache with one changed byte is what was written, or else it is refused or not intact."""
    path = tmp_path / "x.h5"
    found = []
    for content in make(tmp_path):
        path.write_bytes(content)
        whole = everything(path)
        assert whole[0] is True
        for at in range(0, len(content), 13):
            path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
            after = everything(path)
            assert after[0] in ("refused", False) or after == whole, at
            found.append(after[0])
    assert found.count("refused") > 5
    assert found.count(False) + found.count("refused") > len(found) / 20


@pytest.mark.parametrize("workers", [0, 1])
def test_a_changed_case_is_named_when_it_is_first_read(
    workers: int, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copy(cache, tmp_path / "c.h5"))
    with h5py.File(path, "r+") as file:
        file[f"cases/{CASE}/image"][0, 20, 20, 20] += 1
    sets = (*TINY, f"train.workers={workers}", "data.val_fraction=0", "data.holdout=PHANTOM_001")
    assert train("brats_segresnet_demo", (*sets, "data.verify=true"), path, tmp_path / "run") == 2
    told = capfd.readouterr().err
    assert f"error: {path}: the bytes of case {CASE} have changed: prepare it again.\n" in told
    assert "Traceback" not in told
    assert run_main("prepare", "verify", path) == 2
    assert f"the bytes of case {CASE} have changed" in capfd.readouterr().err
    assert train("brats_segresnet_demo", sets, path, tmp_path / "careless") == 0
    assert train("brats_segresnet_demo", (*sets, "data.verify=true"), cache, tmp_path / "intact") == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_changed_image_is_named_when_it_is_first_read(
    workers: int, image_cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copy(image_cache, tmp_path / "c.h5"))
    with h5py.File(path, "r+") as file:
        for start in file["offsets"][:-1]:
            file["bytes"][int(start) + 30] ^= 1
    sets = (*TINY_IMAGES, f"train.workers={workers}", "data.verify=true")
    assert train("multicancer_mobilenetv3_demo", sets, path, tmp_path / "run") == 2
    told = capfd.readouterr().err
    assert f"error: {path}: the bytes of image Oral Cancer/oral_" in told
    assert "Traceback" not in told


def test_a_cache_that_is_being_written_is_none(tmp_path: Path) -> None:
    (content,) = tiny_volumes(tmp_path)[:1]
    part, out = tmp_path / "part.h5", tmp_path / "out" / "c.h5"
    assert content
    seen = []

    def parts() -> Any:
        for name in ("a", "b"):
            yield name, part
            (unfinished,) = out.parent.iterdir()
            copy = Path(shutil.copy(unfinished, tmp_path / f"{name}.h5"))
            with pytest.raises(UserError):
                Cache(copy)
            seen.append(out.exists())

    about: dict[str, Any] = {"labels": {}, "spacing_mm": 1, "preparation": {}}
    volumes.assemble(out, parts(), channels=["x"] * 4, **about)
    assert seen == [False, False]
    assert Cache(out).ids == ["a", "b"]

    def broken() -> Any:
        columns = {"target": np.zeros(1, np.int32), "size": np.ones((1, 2), np.int32),
                   "checksum": np.zeros((1, 16), np.uint8), "histogram": np.zeros((1, 3), np.float32)}  # fmt: skip
        yield Images([b"x"], ["a"], columns)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_images(tmp_path / "new" / "i.h5", broken(), size=2, groups=np.zeros(1), classes=[("X", "a")], facts={},
                     preparation={})  # fmt: skip
    assert list((tmp_path / "new").iterdir()) == []


def test_what_killed_writers_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg.preparation.in_processes", in_this_process)
    data, out = msd_folder(tmp_path / "data"), tmp_path / "out"
    out.mkdir()
    for name in (".123.c.h5", ".123.d.h5", ".x.c.h5"):
        (out / name).write_bytes(b"")
    prepare_dataset(data, out / "c.h5", Preparation())
    assert sorted(path.name for path in out.iterdir()) == [".123.d.h5", ".x.c.h5", "c.h5"]


def without_rights(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that may not write what its mode forbids, as root may."""
    words = list(map(str, command))
    if os.geteuid() == 0:
        words = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *words]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, **options)


@pytest.mark.parametrize("kind", ["volumes", "images"])
def test_a_read_only_cache_in_a_read_only_folder(kind: str, cache: Path, image_cache: Path, tmp_path: Path) -> None:
    place = tmp_path / "shared"
    place.mkdir()
    path = Path(shutil.copy(cache if kind == "volumes" else image_cache, place / "c.h5"))
    path.chmod(0o444)
    place.chmod(0o555)
    try:
        if shutil.which("setpriv") is None or without_rights("touch", place / "x").returncode == 0:
            pytest.skip("no way here to run a program that may not write everywhere")
        recipe, sets = ("brats_segresnet_demo", TINY) if kind == "volumes" else (
            "multicancer_mobilenetv3_demo", TINY_IMAGES)  # fmt: skip
        arguments = [part for item in (*sets, "data.verify=true") for part in ("--set", item)]
        done = without_rights(sys.executable, ROOT / "launch" / "train.py", recipe, "--cache", path, "--out",
                              tmp_path / "run", *arguments)  # fmt: skip
        assert done.returncode == 0, done.stderr
        done = without_rights(sys.executable, ROOT / "launch" / "prepare.py", "verify", path)
        assert done.returncode == 0, done.stderr
        assert "are intact" in done.stdout
    finally:
        place.chmod(0o755)


def prepare(data: Path, out: Path) -> int:
    return run_main("prepare", "brats", "--data", data, "--out", out, "--workers", 1)


def test_of_two_that_prepare_one_cache_the_second_is_told_who_holds_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medseg.preparation.in_processes", in_this_process)
    data, out = msd_folder(tmp_path / "data"), tmp_path / "c.h5"
    with locked(tmp_path / "c.h5.parts", "preparing c.h5"):
        assert prepare(data, out) == 2
        told = capfd.readouterr().err
        assert f"c.h5.parts is in use: {locked_by()}" in told
        assert "is preparing c.h5; wait" in told
        assert not out.exists()
    assert prepare(data, out) == 0
    assert not (tmp_path / "c.h5.parts").exists()
    with locked(tmp_path / "c.h5.parts", "preparing c.h5"):
        assert prepare(data, out) == 0  # it is whole already
    assert "already holds" in capfd.readouterr().out


def locked_by() -> str:
    import getpass

    return getpass.getuser()


HOLD = """
import sys, time
from pathlib import Path
from medtrain.lock import locked
with locked(Path(sys.argv[1]), "preparing c.h5"):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_killed_holder_blocks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg.preparation.in_processes", in_this_process)
    data, out = msd_folder(tmp_path / "data"), tmp_path / "c.h5"
    command = [sys.executable, "-c", HOLD, str(tmp_path / "c.h5.parts")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert prepare(data, out) == 2
        holder.send_signal(signal.SIGKILL)
    assert prepare(data, out) == 0


def test_two_at_once(tmp_path: Path) -> None:
    data, out = msd_folder(tmp_path / "data"), tmp_path / "c.h5"
    command = [sys.executable, str(ROOT / "launch" / "prepare.py"), "brats", "--data", str(data), "--out", str(out)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in range(2)]
    told = [process.communicate(timeout=200)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 0], [0, 2]), told
    assert all("Traceback" not in text for text in told)
    assert all(intact for _, intact in Cache(out).verify())
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("data", "c.h5")] == []


def test_other_data_do_not_replace_a_cache(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medseg.preparation.in_processes", in_this_process)
    first, second, out = msd_folder(tmp_path / "a"), brats_folder(tmp_path / "b"), tmp_path / "c.h5"
    assert prepare(first, out) == 0
    before = out.read_bytes()
    assert prepare(second, out) == 2
    told = capfd.readouterr().err
    assert told == f"error: {out} was made from another folder than {second}: give another --out, or remove it first.\n"
    assert out.read_bytes() == before
    assert str(tmp_path).encode() not in before
    moved = first.rename(tmp_path / "moved")
    assert prepare(moved, out) == 0
    assert "already holds these 1 cases" in capfd.readouterr().out
    moved.rename(first)
    time.sleep(0.01)
    (first / IMAGE).write_bytes(_packed(nifti(scan() * 2)))
    assert prepare(first, out) == 0
    assert "it is made again" in capfd.readouterr().out
    assert out.read_bytes() != before


def _packed(content: bytes) -> bytes:
    import gzip

    made = io.BytesIO()
    with gzip.GzipFile(fileobj=made, mode="wb") as file:
        file.write(content)
    return made.getvalue()
