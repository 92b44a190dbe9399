"""The 360 real MRIs: prepare, audit, train a few steps, predict, table."""

import csv
from collections import defaultdict
from pathlib import Path

import pytest
from launch_helpers import run_main

from medcls.cache import ImageCache
from medcls.duplicates import leaked_paths
from medcls.recipes import ImageData
from medcls.selection import make_split
from medtrain.results import read_rows


@pytest.mark.real_data
def test_prepare_train_predict(real_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, run = tmp_path / "c.h5", tmp_path / "run"
    assert run_main("prepare", "multicancer", "--data", real_images, "--out", cache, "--workers", 2) == 0
    assert "Brain Cancer" in capsys.readouterr().out
    opened = ImageCache(cache)
    assert len(opened.ids) == 360
    assert opened.facts["bad"] == []
    groups = defaultdict(list)
    for path, group in zip(opened.ids, opened.group.tolist(), strict=True):
        groups[group].append(Path(path).stem)
    twins = [names for names in groups.values() if len(names) > 1]
    assert ["brain_glioma_0048", "brain_glioma_0101"] in twins  # the same bytes
    assert max(map(len, twins)) <= 3  # brains are alike, but no chain swallows them
    assert leaked_paths(opened, make_split(opened, ImageData())) == []
    sets = ("data.size=64", "train.epochs=1", "train.workers=1")
    arguments = [part for item in sets for part in ("--set", item)]
    assert run_main("train", "multicancer_mobilenetv3_demo", "--cache", cache, "--out", run, *arguments) == 0
    rows = read_rows(run / "cases.csv")
    assert {row.part for row in rows} == {"val", "test"}
    assert len(rows) == len({row.case for row in rows}) == 108
    out = tmp_path / "p.csv"
    assert run_main("predict", "--members", run, "--image", real_images, "--out", out) == 0
    with open(out, newline="", encoding="utf-8") as file:
        found = {line["image"]: line for line in csv.DictReader(file)}
    assert len(found) == 360
    for row in rows[:20]:
        assert float(found[row.case]["p:brain_glioma"]) == pytest.approx(row.scores["p:brain_glioma"], abs=2e-2)
