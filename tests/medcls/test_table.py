"""Tables from rows: members, three ensembles, the baseline, failures; weights come from validation rows alone."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from medcls import door, metrics, table
from medcls.baseline import NAME, histogram_probs
from medcls.cache import ImageCache
from medcls.duplicates import leaked_paths
from medcls.folders import PUBLISHED
from medcls.published import read_published
from medcls.recipes import ALL_CANCERS, ClsRecipe, ImageData, slug
from medcls.selection import make_split, select
from medtrain.ensemble import log_loss_weights
from medtrain.errors import UserError
from medtrain.files import write_json, write_text
from medtrain.results import CaseRow, read_rows, write_rows
from medtrain.splits import Split

Tiny = Callable[..., ClsRecipe]


def fake_run(sweep: Path, cache: ImageCache, recipe: ClsRecipe, skill: float, seed: int) -> dict:
    """A finished run folder whose rows come from a classifier of that skill."""
    rng = np.random.default_rng(seed)
    run = sweep / door.folder(recipe)
    split, (images, targets, classes) = make_split(cache, recipe.data), select(cache, recipe.data.cancer)
    label = {cache.ids[n]: int(target) for n, target in zip(images, targets, strict=True)}
    rows = []
    for part, cases in (("val", split.val), ("test", split.test)):
        for case in cases:
            target = label[case]
            logits = rng.normal(0, 1, len(classes)) + skill * np.eye(len(classes))[target]
            probs = np.exp(logits) / np.exp(logits).sum()
            rows.append(CaseRow(member=recipe.name, case=case, part=part,
                                scores=metrics.row_scores(target, probs, classes)))  # fmt: skip
    write_rows(run / "cases.csv", rows)
    write_json(run / "cache.json", {"fingerprint": cache.fingerprint})
    write_json(run / "done.json", {"part": "test", "epochs": 3})
    return {"folder": run.name, "recipe": recipe.name, "label": recipe.name, "settings": json.loads(recipe.to_json())}


@pytest.fixture
def sweep(image_cache: Path, tiny_images: Tiny, tmp_path: Path) -> tuple[Path, ImageCache, list[dict]]:
    """Two members of each of two cancers."""
    cache = ImageCache(image_cache)
    members = []
    for cancer in cache.cancers:
        for n, (name, skill) in enumerate((("good", 3.0), ("fair", 1.0))):
            recipe = replace(tiny_images(f"data.cancer={cancer}"), name=name)
            members.append(fake_run(tmp_path, cache, recipe, skill, n))
    return tmp_path, cache, members


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_folds_and_seeds(image_cache: Path, tiny_images: Tiny, tmp_path: Path) -> None:
    """Every image is judged once, by the ensemble of the fold that tests it."""
    cache = ImageCache(image_cache)
    members = []
    for fold in range(3):
        for seed in range(2):
            recipe = tiny_images("data.folds=3", f"data.fold={fold}", f"train.seed={seed}", "data.cancer=Oral Cancer")
            made = fake_run(tmp_path, cache, recipe, 2.0 + seed, 10 * fold + seed)
            members.append({**made, "label": f"m (fold {fold}, seed {seed})"})
    (tmp_path / members[5]["folder"] / "done.json").unlink()
    (tmp_path / members[4]["folder"] / "done.json").unlink()
    assert table.finish(tmp_path, cache, members) == 2
    place = tmp_path / "tables" / "oral_cancer"
    lines = {line["member"]: line for line in read(place / "table.csv")}
    whole = len(select(cache, "Oral Cancer")[0])
    parts = [int(lines[m["label"]]["images"]) for m in members[::2][:2]]
    ensemble = lines[table.ENSEMBLES[0]]
    assert int(ensemble["images"]) == sum(parts) < whole
    assert ensemble["note"] == (
        "of 2 folds, each with weights of its own; without m (fold 2, seed 0), m (fold 2, seed 1)"
    )
    assert int(lines[NAME]["images"]) == whole
    spread = lines["multicancer_mobilenetv3_demo, mean of 4"]["note"]
    mean = np.mean([float(lines[m["label"]]["accuracy"]) for m in members[:4]])
    assert spread.startswith(f"has accuracy {mean:.3f}, standard deviation")
    rows = [row for row in read_rows(place / "cases.csv") if row.member == table.ENSEMBLES[0]]
    assert len({row.case for row in rows}) == len(rows)


def test_a_members_line_counts_the_copies_of_its_own_fold(
    image_cache: Path, tiny_images: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ImageCache(image_cache)
    folds = [tiny_images("data.folds=3", f"data.fold={fold}", "data.split=random", "data.cancer=Oral Cancer")
             for fold in range(3)]  # fmt: skip
    own = [len(leaked_paths(cache, make_split(cache, recipe.data))) for recipe in folds]
    assert sum(own) > max(own) > 0
    members = [
        {**fake_run(tmp_path, cache, recipe, 2.0, n), "label": f"m (fold {n})"} for n, recipe in enumerate(folds)
    ]
    table.finish(tmp_path, cache, members)
    told = {line["member"]: line["duplicates across"] for line in read(tmp_path / "tables/oral_cancer/table.csv")}
    assert [told[f"m (fold {n})"] for n in range(3)] == [str(count) for count in own]
    assert told[NAME] == str(sum(own))


def test_a_cancers_table(sweep: tuple[Path, ImageCache, list[dict]]) -> None:
    place, cache, members = sweep
    assert table.finish(place, cache, members) == 0
    lines = {line["member"]: line for line in read(place / "tables" / "oral_cancer" / "table.csv")}
    assert list(lines) == ["good", "fair", *table.ENSEMBLES, NAME]
    rows = read_rows(place / "tables" / "oral_cancer" / "cases.csv")
    assert {row.part for row in rows} == {"test"}
    for name, line in lines.items():
        mine = [row for row in rows if row.member == name]
        scores = metrics.summarize(*metrics.arrays(mine), 1)
        assert line["positive"] == "oral_scc"
        assert line["images"] == str(len(mine))
        assert float(line["accuracy"]) == pytest.approx(scores["accuracy"], abs=1e-6)
        for score in ("f1_positive", "auroc", "sensitivity", "specificity"):
            assert float(line[score]) == pytest.approx(scores[score], abs=1e-6)
        assert (line["split"], line["duplicates across"]) == ("group", "0")
        counts = read(place / "tables" / "oral_cancer" / f"confusion_{slug(name)}.csv")
        assert sum(int(v) for row in counts for key, v in row.items() if key.startswith("oral")) == len(mine)
        assert imread(place / "tables" / "oral_cancer" / f"confusion_{slug(name)}.png").std() > 0.05
    text = (place / "tables" / "oral_cancer" / "table.md").read_text()
    assert "| member" in text
    assert "macro means over classes" in text
    assert "AUROC is of oral_scc" in text
    assert "sensitivity" in text.splitlines()[0]
    good = next(line for line in text.splitlines() if line.startswith("| good"))
    assert f"{float(lines['good']['auroc']):.3f}" in good
    fair = next(line for line in text.splitlines() if line.startswith("| fair"))
    for score in ("accuracy", "f1_macro"):
        low, value, high = (float(lines["fair"][f"{score}{end}"]) for end in ("_low", "", "_high"))
        assert low <= value <= high
        assert low < high
        assert f"| {value:.3f} ({low:.2f}–{high:.2f}) |" in fair
    brain = (place / "tables" / "brain_cancer" / "table.md").read_text()
    assert "AUROC is the mean of each class" in brain
    assert "sensitivity" not in brain.splitlines()[0]
    assert {line["sensitivity"] for line in read(place / "tables" / "brain_cancer" / "table.csv")} == {""}


def test_a_class_absent_from_the_test_part(
    image_cache: Path, tiny_images: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ImageCache(image_cache)

    def without_the_first(cache: ImageCache, data: ImageData) -> Split:
        images, targets, _ = select(cache, data.cancer)
        first = {cache.ids[n] for n, target in zip(images, targets, strict=True) if target == 0}
        split = make_split(cache, data)
        return replace(split, test=tuple(case for case in split.test if case not in first))

    monkeypatch.setattr(table, "make_split", without_the_first)
    for cancer in cache.cancers:
        sweep = tmp_path / slug(cancer)
        member = fake_run(sweep, cache, tiny_images(f"data.cancer={cancer}"), 1.0, 0)
        path = sweep / member["folder"] / "cases.csv"
        write_rows(path, [row for row in read_rows(path) if row.part == "val" or row.scores["target"] != 0])
        table.finish(sweep, cache, [member])
        line = read(sweep / "tables" / slug(cancer) / "table.csv")[0]
        assert line["auroc"] == line["specificity"] == ""
        kept = [row.scores for row in read_rows(path) if row.part == "test"]
        assert float(line["accuracy"]) == pytest.approx(sum(s["target"] == s["predicted"] for s in kept) / len(kept))
        text = (sweep / "tables" / slug(cancer) / "table.md").read_text().splitlines()
        assert " – |" in text[2]


def test_ensembles_are_weighted_by_validation_and_not_by_test(sweep: tuple[Path, ImageCache, list[dict]]) -> None:
    place, cache, members = sweep
    table.finish(place, cache, members)
    runs = [place / m["folder"] for m in members if "oral" in m["folder"]]
    rows = [read_rows(run / "cases.csv") for run in runs]
    vals = [metrics.arrays([row for row in part if row.part == "val"]) for part in rows]
    tests = [metrics.arrays([row for row in part if row.part == "test"])[1] for part in rows]
    factors = {
        table.ENSEMBLES[0]: [float((p.argmax(1) == t).mean()) for t, p in vals],
        table.ENSEMBLES[1]: [1.0, 1.0],
        table.ENSEMBLES[2]: log_loss_weights(np.stack([p for _, p in vals]), vals[0][0]),
    }
    found = read_rows(place / "tables" / "oral_cancer" / "cases.csv")
    for name, weights in factors.items():
        mean = sum(w * p for w, p in zip(weights, tests, strict=True)) / sum(weights)
        assert np.allclose(metrics.arrays([row for row in found if row.member == name])[1], mean, atol=2e-6)
    # spoiling every test row changes no weight
    notes = {line["member"]: line["note"] for line in read(place / "tables" / "oral_cancer" / "table.csv")}
    for run, part in zip(runs, rows, strict=True):
        spoilt = [r if r.part == "val" else replace(r, scores={**r.scores, "p:oral_scc": 0.5, "p:oral_normal": 0.5})
                  for r in part]  # fmt: skip
        write_rows(run / "cases.csv", spoilt)
    table.finish(place, cache, members)
    again = {line["member"]: line["note"] for line in read(place / "tables" / "oral_cancer" / "table.csv")}
    assert again == notes
    assert notes[table.ENSEMBLES[1]] == "weights 0.50, 0.50"


def test_overview_audit_and_all_rows(sweep: tuple[Path, ImageCache, list[dict]]) -> None:
    place, cache, members = sweep
    table.finish(place, cache, members)
    overview = (place / "table.md").read_text()
    assert overview.splitlines()[0].split("|")[2].strip() == "Brain Cancer"
    fair = next(line for line in overview.splitlines() if line.startswith("| fair "))
    scores = {line["cancer"]: line for line in read(place / "table.csv") if line["member"] == "fair"}
    for cell, cancer in zip(fair.split("|")[2:-1], ("Brain Cancer", "Oral Cancer"), strict=True):
        low, value, high = (float(scores[cancer][f"accuracy{end}"]) for end in ("_low", "", "_high"))
        found = re.findall(r"[\d.]+", cell)
        assert float(found[0]) == value
        assert [float(v) for v in found[1:]] == pytest.approx([low, high], abs=0.0056)
    assert "with a copy in training" in overview  # the audit
    long = read(place / "table.csv")
    assert {line["cancer"] for line in long} == {"Brain Cancer", "Oral Cancer"}
    assert len(long) == 2 * (2 + 3 + 1)
    assert len(read(place / "audit.csv")) == 2
    assert {row.member.split(": ")[1] for row in read_rows(place / "cases.csv")} >= {"good", NAME}
    assert imread(place / "tables" / "brain_cancer" / "accuracy.png").std() > 0.05


def test_the_positive_class_may_be_the_first(image_cache: Path, tiny_images: Tiny, tmp_path: Path) -> None:
    cache = ImageCache(image_cache)
    recipe = tiny_images("data.positive=oral_normal")
    table.finish(tmp_path, cache, [fake_run(tmp_path, cache, recipe, 1.0, 0)])
    place = tmp_path / "tables" / "oral_cancer"
    line = read(place / "table.csv")[0]
    rows = [row for row in read_rows(place / "cases.csv") if row.member == recipe.name]
    found = [row.scores["correct"] for row in rows if row.scores["target"] == 0]
    assert line["positive"] == "oral_normal"
    assert float(line["recall_positive"]) == pytest.approx(np.mean(found), abs=1e-6)
    assert "are of oral_normal" in (place / "table.md").read_text()


def test_a_failed_member_is_a_row_with_its_reason(sweep: tuple[Path, ImageCache, list[dict]]) -> None:
    place, cache, members = sweep
    broken = place / members[-1]["folder"]
    (broken / "done.json").unlink()
    write_json(broken / "failed.json", {"reason": "UserError: no weights"})
    assert table.finish(place, cache, members) == 1
    lines = read(place / "tables" / "oral_cancer" / "table.csv")
    assert [line["member"] for line in lines] == ["good", "fair", NAME]
    assert lines[1]["note"] == "failed: UserError: no weights"
    assert "Oral Cancer: fair failed: UserError: no weights" in (place / "table.md").read_text()
    for member in members:
        (place / member["folder"] / "done.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no finished member"):
        table.finish(place, cache, members)


def test_a_run_judged_on_other_images_is_refused(sweep: tuple[Path, ImageCache, list[dict]]) -> None:
    place, cache, members = sweep
    path = place / members[0]["folder"] / "cases.csv"
    write_rows(path, [replace(row, case=f"{row.case}x") if n == 0 else row for n, row in enumerate(read_rows(path))])
    with pytest.raises(UserError, match="judged on other images than its recipe holds out"):
        table.finish(place, cache, members)


def test_what_makes_scores_too_good_stands_in_the_tables(
    image_cache: Path, tiny_images: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ImageCache(image_cache)
    member = fake_run(tmp_path, cache, tiny_images("data.split=random"), 1.0, 0)
    write_json(tmp_path / member["folder"] / "done.json", {"part": "test", "epochs": 3, "seen_before": 2})
    monkeypatch.setattr(cache, "group", np.zeros_like(cache.group))  # as if all images were one patient's
    table.finish(tmp_path, cache, [member])
    place = tmp_path / "tables" / "oral_cancer"
    lines = read(place / "table.csv")
    assert [line["note"] for line in lines] == ["2 of its test images were known to the weights that it began with", ""]
    told = f"{lines[0]['images']} test images are of a patient with images in training"
    assert told in (place / "table.md").read_text()


def test_other_data_are_refused(sweep: tuple[Path, ImageCache, list[dict]]) -> None:
    place, cache, members = sweep
    write_json(place / members[0]["folder"] / "cache.json", {"fingerprint": "0"})
    with pytest.raises(UserError, match="trained on other data"):
        table.finish(place, cache, members)


def test_published_numbers_stand_only_beside_the_same_kind_of_split(
    sweep: tuple[Path, ImageCache, list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, cache, members = sweep
    drawn: dict[str, list] = {}
    monkeypatch.setattr(table.figures, "write_bars", lambda path, bars, title: drawn.update({path.parent.name: bars}))
    write_text(place / "published.csv", "cancer,member,split,accuracy,source\nOral Cancer,X,group,0.9,paper\n"
               "Oral Cancer,Y,random,0.99,paper\nBrain Cancer,Z,random,0.99,paper\n")  # fmt: skip
    table.finish(place, cache, members)
    assert [name for name, _, _ in drawn["oral_cancer"] if "published" in name] == ["X, as published"]
    assert not any("published" in name for name, _, _ in drawn["brain_cancer"])
    write_text(place / "published.csv", "cancer,member,split,accuracy,source\nOral Cancer,X,group,99.85,paper\n")
    with pytest.raises(UserError, match=r"accuracy \(0 to 1\)"):
        read_published(place / "published.csv")
    write_text(place / "published.csv", "cancer,accuracy\nOral Cancer,high\n")
    with pytest.raises(UserError, match="needs the columns"):
        table.finish(place, cache, members)


def test_the_known_published_number_is_of_every_class(tmp_path: Path) -> None:
    known = read_published(tmp_path / "none.csv")
    assert {p.cancer for p in known} <= {ALL_CANCERS, *PUBLISHED}
    assert all(0 < p.accuracy <= 1 and p.split in ("group", "random") and p.source for p in known)


def test_the_baseline_sees_colours_only() -> None:
    rng = np.random.default_rng(0)
    target = rng.integers(0, 3, 90)
    told = np.eye(3)[target] + rng.normal(0, 0.1, (90, 3))
    probs = histogram_probs(told[:60], target[:60], told[60:], 3)
    assert (probs.argmax(1) == target[60:]).mean() > 0.95
    assert probs.sum(1) == pytest.approx(1)
    partial = histogram_probs(told[:60], np.where(target[:60] == 2, 1, target[:60]), told[60:], 3)
    assert (partial[:, 2] == 0).all()
