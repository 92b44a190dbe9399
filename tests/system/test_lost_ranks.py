"""A rank or a loader process that dies or hangs ends the whole run, and the first thing said is why."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest
from started_run import StartedRun

from medcls.cache import ImageCache

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SEG = ("data.crop=32,32,32", "data.spacing_mm=0", "train.batch=2", "train.epochs=500", "train.precision=fp32",
       "train.validate_every=500", "train.log_every=1")  # fmt: skip
CLS = ("data.size=32", "data.cancer=Oral Cancer", "train.batch=4", "train.epochs=50", "train.precision=fp32")


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[StartedRun]]:
    """Runs that a test starts; none of their processes lives on."""
    runs: list[StartedRun] = []
    yield runs
    for run in runs:
        for pid in run.processes():
            os.kill(pid, signal.SIGKILL)


def start(recipe: str, sets: tuple[str, ...], data: Path, out: Path, ranks: int) -> StartedRun:
    words = [recipe, "--cache", str(data), "--out", str(out), *[part for item in sets for part in ("--set", item)]]
    return StartedRun(words, ranks, out.with_suffix(".log"))


def errors(run: StartedRun) -> list[str]:
    """The lines that begin with error, as the programs say them."""
    return [line for line in run.said().splitlines() if re.match(r"(\[rank\d+\]:\s*)?error: ", line)]


def test_a_killed_rank(cache: Path, tmp_path: Path, started: list[StartedRun]) -> None:
    run = start("brats_segresnet_demo", (*SEG, "train.workers=0"), cache, tmp_path / "run", 2)
    started.append(run)
    assert run.wait_for_a_step(tmp_path / "run"), run.said()
    began = time.monotonic()
    os.kill(run.rank(1), signal.SIGKILL)
    assert run.end(60) != 0
    assert time.monotonic() - began < 30
    said = run.said()
    assert re.search(r"exitcode\s*:\s*-9 .*", said)  # torchrun's own summary names the rank
    assert all(re.match(r"error: rank 0: rank 1 was lost after step \d+", line) for line in errors(run)), said
    assert "gloo" not in said
    assert "RuntimeError" not in said


def test_a_rank_that_hangs(cache: Path, tmp_path: Path, started: list[StartedRun]) -> None:
    run = start("brats_segresnet_demo", (*SEG, "train.workers=0", "train.timeout_s=5"), cache, tmp_path / "run", 2)
    started.append(run)
    assert run.wait_for_a_step(tmp_path / "run"), run.said()
    os.kill(run.rank(1), signal.SIGSTOP)
    assert run.end(90) != 0
    (line,) = errors(run)
    assert re.match(r"error: rank 0: rank 1 does not answer after step \d+: see .*train\.timeout_s", line)
    assert "RuntimeError" not in run.said()


def test_a_rank_whose_image_is_unreadable(image_cache: Path, tmp_path: Path, started: list[StartedRun]) -> None:
    """The rank that meets it says so first; the other one adds a line, not a traceback."""
    copy = tmp_path / "images.h5"
    copy.write_bytes(image_cache.read_bytes())
    images = [n for n, path in enumerate(ImageCache(image_cache).ids) if "Oral" in path]
    with h5py.File(copy, "r+") as file:
        for n in images[::7]:
            file["bytes"][file["offsets"][n] : file["offsets"][n + 1]] = 0
    run = start("multicancer_mobilenetv3_demo", (*CLS, "train.workers=1"), copy, tmp_path / "run", 2)
    started.append(run)
    assert run.end(120) != 0
    lines = errors(run)
    assert re.match(r"error: .*images\.h5: image .*Oral.* is no PNG or JPEG of the size", lines[0]), run.said()
    assert all("is no PNG or JPEG" in line or "failed after step" in line for line in lines)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loader_process_that_is_killed(workers: int, cache: Path, tmp_path: Path, started: list[StartedRun]) -> None:
    run = start("brats_segresnet_demo", (*SEG, f"train.workers={workers}"), cache, tmp_path / "run", 1)
    started.append(run)
    assert run.wait_for_a_step(tmp_path / "run"), run.said()
    children = [pid for pid in run.processes() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(children) == workers
    began = time.monotonic()
    os.kill(children[0], signal.SIGKILL)
    assert run.end(60) == 1
    assert time.monotonic() - began < 30
    assert errors(run), run.said()
    (line,) = errors(run)
    assert line.startswith("error: a loader process of rank 0 ended by signal 9")
    assert "Traceback" not in run.said()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["step"] >= 1
