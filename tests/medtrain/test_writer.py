"""Checkpoints beside training: what is written is what was given, in order, and errors come out."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from medtrain import checkpoint
from medtrain.writer import PENDING, Writer


def test_what_is_written_is_what_it_was_when_given(tmp_path: Path) -> None:
    writer, weight = Writer(), torch.zeros(1000)
    state = {"model": {"w": weight}, "optimizer": {"state": {0: (weight, [weight])}}, "step": 1}
    writer.write(tmp_path / "c.pt", state)
    weight += 1
    writer.wait()
    content = checkpoint.load(tmp_path / "c.pt")
    assert content["model"]["w"].sum() == 0
    assert content["optimizer"]["state"][0][1][0].sum() == 0
    assert content["step"] == 1


def test_order_and_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def slow(path: Path, content: dict[str, Any], previous: Path | None) -> None:
        time.sleep(0.05)
        written.append(content["step"])

    monkeypatch.setattr(checkpoint, "save", slow)
    writer = Writer()
    for step in range(6):
        writer.write(tmp_path / "c.pt", {"step": step})
        assert step + 1 - len(written) <= PENDING
    writer.wait()
    assert written == list(range(6))


def test_an_error_comes_out(tmp_path: Path) -> None:
    writer = Writer()
    (tmp_path / "file").write_text("")
    writer.write(tmp_path / "file" / "c.pt", {"model": {}})
    with pytest.raises(FileExistsError):
        writer.wait()
    writer.write(tmp_path / "c.pt", {"model": {}})  # and the next one is tried again
    writer.wait()
    assert checkpoint.load(tmp_path / "c.pt")["model"] == {}
