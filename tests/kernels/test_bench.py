"""The benchmarks run, in tiny; without a GPU they refuse to measure and write nothing."""

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from medkernels import measurement
from medseg.recipes import RECIPES

BENCH = Path(__file__).parents[1] / "bench"
KERNELS = sorted((Path(__file__).parents[2] / "kernels").glob("*/bench.py"))


def load(script: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    spec = importlib.util.spec_from_file_location(f"bench_{script.parent.name}_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the benchmarks themselves run")
@pytest.mark.parametrize("script", ["gpu_kernels.py", "gpu_step.py"])
def test_a_smoke_run_takes_every_rival_and_writes_nothing(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = measurement.RESULTS.read_bytes()
    load(BENCH / script, monkeypatch).main(["--smoke"])
    lines = capsys.readouterr().out.splitlines()
    wanted = [path.parent.name for path in KERNELS] if script == "gpu_kernels.py" else ["segresnet_step"]
    for kernel in wanted:
        for rival in ("eager", "torch.compile", "fused"):
            assert any(line.startswith(kernel) and rival in line for line in lines)
    assert measurement.RESULTS.read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the benchmarks themselves run")
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("gpu_inference.py", [f"probabilities against MONAI's inferer, {nets}: 0 "
                              for nets in ("the same networks", "MONAI's norms")]),
        ("gpu_networks.py", ["brats_segresnet, kernels:"]),
    ],
)  # fmt: skip
def test_benchmarks_of_whole_networks_run(
    script: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load(BENCH / script, monkeypatch)
    before = (BENCH / "results.csv").read_bytes()
    module.main(["--smoke"])
    said = capsys.readouterr().out
    assert all(some in said for some in words), said
    assert (BENCH / "results.csv").read_bytes() == before
    with pytest.raises(SystemExit, match="no CUDA device"):
        module.main([])


@pytest.mark.parametrize(
    "script",
    [*KERNELS, BENCH / "gpu_step.py", BENCH / "gpu_kernels.py"],
    ids=lambda path: f"{path.parent.name}_{path.stem}",
)
def test_without_a_gpu_nothing_is_measured(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        load(script, monkeypatch).main([])


def test_a_row_has_a_cell_for_every_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(csv.reader(measurement.RESULTS.read_text(encoding="utf-8").splitlines()))
    assert tuple(rows[0]) == measurement.HEAD
    monkeypatch.setattr(measurement, "RESULTS", tmp_path / "benchmarks.csv")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    measurement.append(["cell"] * 11)
    (row,) = csv.reader((tmp_path / "benchmarks.csv").read_text(encoding="utf-8").splitlines())
    assert len(row) == len(measurement.HEAD)
    assert row[11] == "a device"


def test_the_count_of_a_steps_elements_is_that_of_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = load(BENCH / "step_bytes.py", monkeypatch).elements(32, 2)
    levels = [2 * 16 * 32**3 // 4**n for n in range(4)]  # channels double, sides halve
    # two norms a block, blocks 1 2 2 4 down and 1 1 1 up, and one before the last convolution
    norms = sum(n * level for n, level in zip((5, 6, 6, 8), levels, strict=True))
    assert counts == {"group_norm_relu": norms, "upsample_add": sum(levels[:3]), "region_dice": 2 * 3 * 32**3}


def test_the_bytes_of_instance_norms_are_those_of_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(BENCH / "step_bytes.py", monkeypatch).instance_norms("brats_dynunet", 64, 2)
    depth = RECIPES["brats_dynunet"]().model.levels
    levels = [2 * min(320, 32 * 2**n) * (64 // 2**n) ** 3 for n in range(depth)]
    # two norms a block, a block a level down and, but for the lowest, up
    norms = sum(level * (4 if n < depth - 1 else 2) for n, level in enumerate(levels))
    assert found == {"eager": norms * 26 / 1e9, "fused": norms * 16 / 1e9}
