"""Small files that unpack to very much: refused within a bounded memory, which the system enforces, and time."""

import gzip
import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile import CASE, IMAGE, chunk, dim, msd_folder, nifti, png, scan, with_header
from launch_helpers import ROOT, check_refused

# What the programs may take beside their libraries, and the seconds of one.
SPARE_GB, LIMIT_S = 3, 60
PROGRAM = """
import resource, sys
sys.path.insert(0, "tests")
from launch_helpers import in_this_process, run_main
import medcls.preparation, medseg.preparation
medcls.preparation.in_processes = medseg.preparation.in_processes = in_this_process
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (int(sys.argv[1]) << 30),) * 2)
sys.exit(run_main("prepare", *sys.argv[2:]))
"""
ZEROS = gzip.compress(bytes(16 << 20), 1)  # members of a gzip file may follow one another


def bomb_scan(sizes: tuple[int, ...], after_mb: int = 0, dtype: int = 4) -> Callable[[Path], object]:
    """A scan of zeros whose header tells the truth, and what follows its voxels."""
    raw = with_header(nifti(scan())[:352], dim=dim(*sizes), datatype=dtype, bitpix=16)
    count = 2 * int(np.prod(sizes, dtype=np.int64))
    whole, rest = divmod(count, 16 << 20)
    content = gzip.compress(raw, 1) + ZEROS * whole + gzip.compress(bytes(rest), 1) + ZEROS * (after_mb // 16)
    return lambda data: (data / IMAGE).write_bytes(content)


SCANS = {
    "2^31 voxels": (bomb_scan((800, 800, 839, 4)), "more than 1,073,741,824"),
    "10^9 voxels": (bomb_scan((630, 630, 630, 4)), "does not fit into memory|zero everywhere"),
    "100 GB after the voxels": (bomb_scan((10, 12, 8, 4), 100_000), "goes on after the voxels"),
}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(SPARE_GB), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT, check=False)


@pytest.mark.parametrize("name", SCANS)
def test_scans(name: str, tmp_path: Path) -> None:
    change, words = SCANS[name]
    data, out = msd_folder(tmp_path / "data"), tmp_path / "out"
    change(data)
    done = run("brats", "--data", data, "--out", out / "c.h5", "--workers", 1)
    check_refused(done.returncode, done.stderr, f"{CASE}.nii.gz", words, out)


def test_images(tmp_path: Path) -> None:
    """A picture at the limit is read, those beyond are set aside."""
    white = zlib.compress(bytes((9990 * 3 + 1) * 9990), 1)
    big = png(9990, 9990, rows=b"").replace(chunk(b"IDAT", zlib.compress(b"")), chunk(b"IDAT", white))
    texts = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 28), 1))
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "good.png").write_bytes(png(40, 30 + len(name)))
    (tmp_path / "data" / "a" / "big.png").write_bytes(big)
    (tmp_path / "data" / "a" / "huge.png").write_bytes(png(2_000_000, 2_000_000, rows=b""))
    (tmp_path / "data" / "a" / "text.png").write_bytes(png(40, 30, *[texts] * 8))
    (tmp_path / "data" / "b" / "big.png").write_bytes(big)
    done = run("multicancer", "--data", tmp_path / "data", "--out", tmp_path / "c.h5", "--workers", 1)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("set aside: a/")]
    assert len(told) == 2
    assert "huge.png: 2000000 x 2000000 pixels are more than 100 megapixels" in told[0]
    assert "text.png" in told[1]


def test_a_listing(tmp_path: Path) -> None:
    data, out = msd_folder(tmp_path / "data"), tmp_path / "out"
    (data / "dataset.json").write_text(json.dumps({"training": "[" * (60 << 20)}))
    done = run("brats", "--data", data, "--out", out / "c.h5", "--workers", 1)
    check_refused(done.returncode, done.stderr, "dataset.json", "MSD form", out)
