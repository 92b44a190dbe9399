"""Runs that are killed again and again end as if nothing had happened: same weights, same rows, nothing left behind.

MEDTRAIN_KILLS says how often; `MEDTRAIN_KILLS=50 python -m pytest tests/system/test_torture.py -s` is the long form.
"""

import os
import random
import re
import time
from pathlib import Path

import pytest
import torch
from started_run import WAYS, StartedRun

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

KILLS = int(os.environ.get("MEDTRAIN_KILLS", "2"))
SEG = ("data.crop=32,32,32", "data.spacing_mm=0", "data.val_fraction=0.4", "train.batch=2",
       f"train.epochs={max(30, 3 * KILLS)}", "train.validate_every=10", "train.precision=fp32", "train.workers=0",
       "train.deterministic=true", "train.save_every_s=0")  # fmt: skip
CLS = ("data.size=32", "data.cancer=Oral Cancer", "train.batch=4", f"train.epochs={max(12, 3 * KILLS)}",
       "train.precision=fp32", "train.workers=1", "train.validate_every=4", "train.deterministic=true",
       "train.save_every_s=0")  # fmt: skip


def content(run: Path) -> tuple[dict[str, torch.Tensor], str]:
    return torch.load(run / "checkpoint_last.pt", weights_only=True)["model"], (run / "cases.csv").read_text()


def lasting(names: set[str]) -> set[str]:
    """Which of these names in shared memory stay there and are of no living process: other tests may run beside."""
    ended = time.monotonic() + 60
    while names and time.monotonic() < ended:
        names &= set(os.listdir("/dev/shm"))
        owners = {name: re.search(r"(?:loky|torch)[-_](\d+)", name) for name in names}
        names = {name for name, found in owners.items() if not (found and Path(f"/proc/{found[1]}").exists())}
        time.sleep(1)
    return names


@pytest.mark.parametrize(("task", "ranks"), [("brats", 1), ("brats", 2), ("multicancer", 1), ("multicancer", 2)])
def test_a_run_that_is_killed_again_and_again(
    task: str, ranks: int, cache: Path, image_cache: Path, tmp_path: Path
) -> None:
    recipe, sets, data = {"brats": ("brats_segresnet_demo", SEG, cache),
                          "multicancer": ("multicancer_mobilenetv3_demo", CLS, image_cache)}[task]  # fmt: skip
    words = [recipe, "--cache", str(data), *[part for item in sets for part in ("--set", item)]]
    shared = set(os.listdir("/dev/shm"))
    began = time.monotonic()
    whole = StartedRun([*words, "--out", str(tmp_path / "whole")], ranks, tmp_path / "whole.log")
    assert whole.end(300) == 0, whole.said()[-2000:]
    spent = time.monotonic() - began
    rng, out = random.Random(ranks), tmp_path / "killed"
    ways = [WAYS[n % len(WAYS)] for n in range(KILLS)]
    rng.shuffle(ways)
    inside = 0
    for number, way in enumerate(ways):
        run = StartedRun([*words, "--out", str(out)], ranks, tmp_path / "killed.log")
        if run.wait_for_steps():
            run.wait_for_a_save(out)
            time.sleep(rng.uniform(0, spent / (KILLS + 1)))
            if way.startswith("SIGKILL") and number % 2 == 0:
                run.wait_for_a_writing(out)
        run.hit(way, rng)
        code = run.end()
        writing = out.is_dir() and any(path.name.startswith(".") for path in out.glob(".*checkpoint*"))
        inside += writing
        told = f"{way}{', inside the writing of a checkpoint' if writing else ''}, exit code {code}"
        print(f"{task}, {ranks} ranks, {number + 1}: {told}", flush=True)
    last = StartedRun([*words, "--out", str(out)], ranks, tmp_path / "killed.log")
    assert last.end(300) == 0, last.said()[-2000:]
    (weights, rows), (wanted, wanted_rows) = content(out), content(tmp_path / "whole")
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert rows == wanted_rows
    assert lasting(set(os.listdir("/dev/shm")) - shared) == set()
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    print(f"{task}, {ranks} ranks: same weights and rows after {KILLS} kills, {inside} inside a writing", flush=True)
