"""A full disk: one sentence, exit code 2, and what was whole before stays whole. Needs root to mount a small tmpfs."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launch_helpers import run_main

from medseg.cache import part_fits
from medseg.recipes import SegRecipe
from medtrain import checkpoint


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a tmpfs of that many kilobytes."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        place = tmp_path / f"disk{kilobytes}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("no right to mount a small tmpfs")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        # lazily: TensorBoard's thread may still hold its file
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_prepare(
    phantoms: Path, small_disk: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(3000)
    assert run_main("prepare", "brats", "--data", phantoms, "--out", disk / "c.h5", "--workers", 1) == 2
    error = capsys.readouterr().err
    assert "no space left" in error
    assert "Traceback" not in error
    parts = sorted((disk / "c.h5.parts").glob("P*.h5"))
    assert parts
    assert [path.name for path in (disk / "c.h5.parts").iterdir() if path.name.startswith(".")] == []
    assert not (disk / "c.h5").exists()
    import h5py

    for part in parts:
        with h5py.File(part) as file:
            recipe = file.attrs["recipe"].decode()
        assert part_fits(part, recipe)


def test_train(
    cache: Path,
    tiny: Callable[..., SegRecipe],
    small_disk: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = small_disk(16000) / "run"  # one checkpoint of 14 MB fits, two do not
    sets = ("data.crop=32,32,32", "data.spacing_mm=0", "train.epochs=2", "train.workers=0", "train.save_every_s=0",
            "optim.ema=0", "train.validate_every=9")  # fmt: skip
    arguments = [part for item in sets for part in ("--set", item)]
    assert run_main("train", "brats_segresnet_demo", "--cache", cache, "--out", out, *arguments) == 2
    error = capsys.readouterr().err
    assert "no space left" in error
    assert "checkpoint" in error
    assert checkpoint.load(out / checkpoint.LAST)["step"] >= 1
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kilobytes", [16, 20, 24, 28])
def test_rows_and_tensorboard(
    kilobytes: int, cache: Path, small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Status, metrics.jsonl and TensorBoard's events fill the disk, one or the other first."""
    out = small_disk(kilobytes) / "run"
    sets = ("data.crop=32,32,32", "data.spacing_mm=0", "train.epochs=9", "train.workers=0", "train.log_every=1",
            "train.batch=1", "train.validate_every=9", "train.precision=fp32")  # fmt: skip
    arguments = [part for item in sets for part in ("--set", item)]
    assert run_main("train", "brats_segresnet_demo", "--cache", cache, "--out", out, *arguments) == 2
    error = capsys.readouterr().err
    assert f"no space left while writing {out}" in error
    assert re.search(r" \((0|4,096) bytes are free\): ", error)  # the lock's own are given back before it is said
    assert "Traceback" not in error
    assert (out / "recipe.json").is_file()
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_prepare_images(pictures: Path, small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]) -> None:
    disk = small_disk(1500)
    assert run_main("prepare", "multicancer", "--data", pictures, "--out", disk / "c.h5", "--workers", 1) == 2
    error = capsys.readouterr().err
    assert f"no space left while writing {disk}" in error
    assert "Traceback" not in error
    assert not (disk / "c.h5").exists()
    assert [path.name for path in disk.rglob(".*")] == []
