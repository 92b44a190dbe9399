"""Checkpoints: the one before is kept, damage is found by checksum and set aside, nothing in them is executed."""

import errno
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from medlaunch.run import run
from medseg.recipes import SegRecipe
from medtrain import checkpoint
from medtrain.errors import Failed, Stopped, UserError


def save(folder: Path, step: int, **options: object) -> None:
    content = {"model": {"weight": torch.full((100, 100), float(step))}, "step": step}
    checkpoint.save(folder / checkpoint.LAST, content, folder / checkpoint.PREVIOUS, **options)  # type: ignore[arg-type]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def data_start(path: Path) -> int:
    """Where the largest record's bytes begin."""
    with zipfile.ZipFile(path) as archive:
        info = max(archive.infolist(), key=lambda item: item.file_size)
    return info.header_offset + path.read_bytes()[info.header_offset :].find(np.float32(1).tobytes())


def test_the_one_before_is_kept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert not (tmp_path / checkpoint.PREVIOUS).exists()
    save(tmp_path, 2)
    save(tmp_path, 3)
    assert checkpoint.load(tmp_path / checkpoint.LAST)["step"] == 3
    assert checkpoint.load(tmp_path / checkpoint.PREVIOUS)["step"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.LAST, checkpoint.PREVIOUS}


def test_a_crash_before_the_new_one_has_its_name_leaves_nothing_later(tmp_path: Path) -> None:
    save(tmp_path, 1)
    os.link(tmp_path / checkpoint.LAST, tmp_path / checkpoint.PREVIOUS)
    save(tmp_path, 2)
    assert checkpoint.load(tmp_path / checkpoint.PREVIOUS)["step"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.LAST, checkpoint.PREVIOUS}


def test_also_on_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert checkpoint.load(tmp_path / checkpoint.LAST)["step"] == 2
    assert checkpoint.load(tmp_path / checkpoint.PREVIOUS)["step"] == 1


def test_every_flipped_bit_of_the_weights_is_found(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / checkpoint.LAST
    start, whole = data_start(path), path.read_bytes()
    for position in np.random.default_rng(0).integers(start, start + 40_000, 20):
        flip(path, int(position))
        with pytest.raises(UserError, match="is damaged"):
            checkpoint.load(path)
        path.write_bytes(whole)
    assert checkpoint.load(path)["step"] == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign"])
def test_a_damaged_newest_one_is_set_aside(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / checkpoint.LAST
    if damage == "flip":
        flip(path, path.stat().st_size // 2)
    else:
        path.write_bytes({"cut": path.read_bytes()[:5000], "empty": b"", "foreign": b"\x89PNG" * 100}[damage])
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[0] == tmp_path / checkpoint.PREVIOUS
    assert "was set aside as checkpoint_last.damaged.pt" in found[1]
    assert (tmp_path / "checkpoint_last.damaged.pt").exists()
    flip(tmp_path / checkpoint.PREVIOUS, path.stat().st_size // 2 if path.exists() else 20_000)
    with pytest.raises(UserError, match=f"{checkpoint.PREVIOUS} is damaged"):
        checkpoint.newest(tmp_path)


def test_a_single_damaged_one_is_told_and_left(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / checkpoint.LAST).write_bytes(b"x")
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.newest(tmp_path)
    assert (tmp_path / checkpoint.LAST).exists()


def test_a_run_goes_on_from_the_one_before_to_the_same_weights(
    cache: Path, tiny: Callable[..., SegRecipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny("train.epochs=3", "train.validate_every=100", "train.save_every_s=0")
    whole, out, asked = tmp_path / "whole", tmp_path / "run", []
    run(recipe, cache, whole)

    def stop() -> bool:
        asked.append(1)
        return len(asked) >= 6

    with pytest.raises(Stopped):
        run(recipe, cache, out, stop)
    path = out / checkpoint.LAST
    flip(path, path.stat().st_size // 2)
    run(recipe, cache, out)
    assert "is damaged: it was set aside" in capsys.readouterr().out
    a, b = (checkpoint.load(folder / checkpoint.LAST)["model"] for folder in (whole, out))
    assert all(torch.equal(a[name], b[name]) for name in a)


class Payload:
    """Would write a file if it were unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.target, "executed")


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle"])
def test_a_checkpoint_with_a_payload_is_refused_and_not_executed(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "bad.pt", tmp_path / "executed"
    content = {"model": Payload(target)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match=r"bad\.pt is damaged or no checkpoint of this program"):
        checkpoint.load(path)
    assert not target.exists()


def test_a_disk_that_fails_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An intact checkpoint is not set aside, nor is its removal advised, because a network was away."""
    for name in (checkpoint.PREVIOUS, checkpoint.LAST):
        checkpoint.save(tmp_path / name, {"model": {}})

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("zipfile.ZipFile.testzip", fail)
    with pytest.raises(Failed, match=r"checkpoint_last\.pt can not be read \(Input/output error\): run the same"):
        checkpoint.newest(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.LAST, checkpoint.PREVIOUS]
