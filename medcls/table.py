"""The tables of a sweep: per cancer its members, three ensembles and the baseline; one overview; all from rows."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from medcls import baseline, figures, metrics
from medcls.audit import audit_lines
from medcls.cache import ImageCache
from medcls.duplicates import leaked_paths, relatives
from medcls.folders import choose_cancer
from medcls.positive import choose_positive
from medcls.published import Published, read_published
from medcls.recipes import ClsRecipe, slug
from medcls.selection import make_split, select
from medtrain.aside import listing_of
from medtrain.ensemble import log_loss_weights, weighted_mean
from medtrain.errors import UserError
from medtrain.files import write_text
from medtrain.results import CaseRow, read_rows, write_rows
from medtrain.run_folder import DONE, ROWS, check_some_done, check_trained_on, is_done, read_done, why_missing
from medtrain.splits import Split
from medtrain.tables import to_csv, to_markdown
from medtrain.wording import listed

SCORES = {"accuracy": "accuracy", "recall": "recall_macro", "precision": "precision_macro", "F1": "f1_macro",
          "AUROC": "auroc", "sensitivity": "sensitivity", "specificity": "specificity"}  # fmt: skip
LIMITS = ("accuracy_low", "accuracy_high", "f1_macro_low", "f1_macro_high")
OF_POSITIVE = ("sensitivity", "specificity")
BRACKETS = (
    f"In brackets: 95 % bootstrap intervals of {metrics.RESAMPLES} resamplings of the test images, which take "
    "near-duplicates for independent images."
)
ABOUT = ("images", "split", "duplicates across", "epochs", "note")
ENSEMBLES = ("Ensemble, accuracy weights", "Ensemble, equal weights", "Ensemble, log-loss weights")
LONG = ("accuracy", "recall_macro", "precision_macro", "f1_macro", "recall_weighted", "precision_weighted",
        "f1_weighted", "recall_positive", "precision_positive", "f1_positive", "log_loss", "auroc", "sensitivity",
        "specificity", *LIMITS)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line of a cancer's table: its rows on the test images, or why there are none."""

    member: str
    rows: Sequence[CaseRow]
    epochs: str = ""
    note: str = ""
    positive: int | None = None
    failed: bool = False
    leaked: int | None = None  # of its own test images, where these are not all of the table's

    @cached_property
    def scores(self) -> dict[str, float]:
        """All scores and the intervals of two; empty where there are no rows."""
        if not self.rows:
            return {}
        target, probs = metrics.arrays(self.rows)
        return metrics.summarize(target, probs, self.positive) | metrics.intervals(target, probs)


@dataclass(frozen=True)
class CancerTable:
    """Everything told of one cancer."""

    cancer: str
    lines: list[Line]
    split: str
    leaked: int
    related: int  # test images with a near-duplicate or another image of their patient in training
    classes: list[str]
    positive: str  # the name of the positive class, "" where there are more than two


def finish(sweep: Path, cache: ImageCache, members: Sequence[dict[str, Any]]) -> int:
    """Write every table and picture from the members' rows; returns how many members are missing."""
    check_some_done(sweep, members)
    recipes = {m["folder"]: _recipe(m, sweep) for m in members}
    cancers = list(dict.fromkeys(recipe.data.cancer for recipe in recipes.values()))
    tables = []
    for cancer in cancers:
        mine = [m for m in members if recipes[m["folder"]].data.cancer == cancer]
        tables.append(_cancer(sweep, cache, mine, [recipes[m["folder"]] for m in mine]))
    published = read_published(sweep / "published.csv")
    foot = _foot(cache)
    names = [slug(table.cancer) for table in tables]
    for n, table in enumerate(tables):
        place = names[n] if names.count(names[n]) == 1 else f"{names[n]}_{n + 1}"
        _write_cancer(sweep / "tables" / place, table, foot, published)
    audit = audit_lines(cache, [recipes[m["folder"]].data for m in members])
    write_text(sweep / "audit.csv", to_csv(audit))
    _write_overview(sweep, tables, audit, foot)
    write_rows(sweep / "cases.csv", [_short(r, t.cancer) for t in tables for line in t.lines for r in line.rows])
    return sum(not is_done(sweep / m["folder"]) for m in members)


def _recipe(member: dict[str, Any], sweep: Path) -> ClsRecipe:
    return ClsRecipe.from_json(json.dumps(member["settings"]), str(sweep / "plan.json"))


def _short(row: CaseRow, cancer: str) -> CaseRow:
    """A row without its probabilities, whose columns differ between cancers (they stay in the cancer's own file)."""
    kept = {name: row.scores[name] for name in ("target", "predicted", "correct")}
    return CaseRow(member=f"{cancer}: {row.member}", case=row.case, part=row.part, scores=kept)


def _cancer(sweep: Path, cache: ImageCache, members: Sequence[dict[str, Any]],
            recipes: Sequence[ClsRecipe]) -> CancerTable:  # fmt: skip
    """`recipes` are the members'. Members of one fold are averaged together and judged on its test images."""
    lines: list[Line] = []
    vals: dict[str, list[CaseRow]] = {}
    tests: dict[str, list[CaseRow]] = {}
    _, _, classes = select(cache, choose_cancer(cache, recipes[0].data.cancer))
    splits = {recipe.data.fold: make_split(cache, recipe.data) for recipe in recipes}
    for member, recipe in zip(members, recipes, strict=True):
        run, name = sweep / member["folder"], member["label"]
        if not is_done(run):
            lines.append(Line(name, [], note=f"failed: {why_missing(run)}", failed=True))
            continue
        check_trained_on(run, cache)
        done = read_done(run / DONE, epochs=int)
        rows = _rows_of(run, classes)
        _check_split(run, rows, splits[recipe.data.fold], cache)
        vals[name] = [row for row in rows if row.part == "val"]
        tests[name] = [replace(row, member=name) for row in rows if row.part == "test"]
        leaked = len(leaked_paths(cache, splits[recipe.data.fold]))
        lines.append(Line(name, tests[name], str(done["epochs"]), _known(done), leaked=leaked))
    missing = [line.member for line in lines if line.failed]
    lines += _spread(lines, members)
    together: list[list[Line]] = []
    base: list[CaseRow] = []
    folds = {recipe.data.fold: recipe for recipe in recipes}
    for fold, recipe in sorted(folds.items()):
        labels = [m["label"] for m, r in zip(members, recipes, strict=True) if r.data.fold == fold]
        mine = [name for name in labels if name in tests]
        if len(mine) > 1:
            together.append(_ensembles({n: vals[n] for n in mine}, {n: tests[n] for n in mine}))
        base += _baseline_rows(cache, recipe, splits[fold])
    lines += _joined(together, missing)
    lines.append(Line(baseline.NAME, base))
    positive = choose_positive(classes, next((r.data.positive for r in recipes if r.data.positive), ""))
    lines = [replace(line, positive=positive) for line in lines]
    named = "" if positive is None else classes[positive]
    leaked = sum(len(leaked_paths(cache, split)) for split in splits.values())
    related = sum(len(relatives(cache, cache.group, split.train, split.test)) for split in splits.values())
    return CancerTable(recipes[0].data.cancer, lines, recipes[0].data.split, leaked, related, classes, named)


def _check_split(run: Path, rows: Sequence[CaseRow], split: Split, cache: ImageCache) -> None:
    """An older run may have been judged on images that its recipe would train on today."""
    for part, cases in (("val", split.val), ("test", split.test)):
        if {row.case for row in rows if row.part == part} != set(cases):
            raise UserError(f"{run} was judged on other images than its recipe holds out of {cache.path} today: train "
                            "it again, in another folder.")  # fmt: skip


def _known(done: Mapping[str, Any]) -> str:
    """What a member's done.json tells of the weights that it began with."""
    seen = done.get("seen_before")  # older runs do not tell
    known = isinstance(seen, int) and seen > 0
    return f"{seen} of its test images were known to the weights that it began with" if known else ""


def _rows_of(run: Path, classes: Sequence[str]) -> list[CaseRow]:
    names = [f"{metrics.PROBABILITY}{name}" for name in classes]
    path = run / ROWS
    rows = read_rows(path, ("target", "predicted", "correct", *names))
    parts = {row.part for row in rows}
    fit = all(row.scores["target"] in range(len(classes)) and all(0 <= row.scores[n] <= 1 for n in names)
              for row in rows)  # fmt: skip
    if parts != {"val", "test"} or not fit or [n for n in rows[0].scores if n.startswith(metrics.PROBABILITY)] != names:
        raise UserError(f"{path} does not fit the classes {listed(classes)}: train that run again.")
    return rows


def _joined(folds: Sequence[Sequence[Line]], missing: Sequence[str]) -> list[Line]:
    """The ensembles of all folds as one line each; their notes say which members they lack."""
    lacks = f"; without {', '.join(missing)}" if missing else ""
    joined = []
    for same in zip(*folds, strict=True):
        note = same[0].note if len(same) == 1 else f"of {len(same)} folds, each with weights of its own"
        joined.append(Line(same[0].member, [row for line in same for row in line.rows], note=note + lacks))
    return joined


def _spread(lines: Sequence[Line], members: Sequence[dict[str, Any]]) -> list[Line]:
    """A line a recipe that several finished members share: mean and standard deviation of their accuracy."""
    recipe = {member["label"]: member["recipe"] for member in members}
    told = []
    for name in dict.fromkeys(recipe.values()):
        mine = [line.scores["accuracy"] for line in lines if recipe[line.member] == name and line.rows]
        if len(mine) > 1:
            note = f"has accuracy {np.mean(mine):.3f}, standard deviation {np.std(mine, ddof=1):.3f}"
            told.append(Line(f"{name}, mean of {len(mine)}", [], note=note))
    return told


def _ensembles(vals: dict[str, list[CaseRow]], tests: dict[str, list[CaseRow]]) -> list[Line]:
    """The three ensembles; their weights see validation rows only."""
    probs = [metrics.arrays(rows)[1] for rows in tests.values()]
    first = next(iter(tests.values()))
    if any([row.case for row in rows] != [row.case for row in first] for rows in tests.values()):
        raise UserError(f"the members {', '.join(tests)} were judged on different images: train them with one split.")
    seen = [metrics.arrays(rows) for rows in vals.values()]
    accuracy = [float((p.argmax(1) == target).mean()) for target, p in seen]
    factors = {
        ENSEMBLES[0]: accuracy if sum(accuracy) else [1.0] * len(probs),
        ENSEMBLES[1]: [1.0] * len(probs),
        ENSEMBLES[2]: log_loss_weights(np.stack([p for _, p in seen]), seen[0][0]),
    }
    lines = []
    for name in ENSEMBLES:
        mean = weighted_mean(probs, factors[name]).astype(np.float64)
        weights = ", ".join(f"{w / sum(factors[name]):.2f}" for w in factors[name])
        lines.append(Line(name, _rows(name, first, mean), note=f"weights {weights}"))
    return lines


def _rows(name: str, like: Sequence[CaseRow], probs_NK: np.ndarray) -> list[CaseRow]:
    """Rows of the same images with other probabilities."""
    names = [key.removeprefix(metrics.PROBABILITY) for key in like[0].scores if key.startswith(metrics.PROBABILITY)]
    scores = [metrics.row_scores(round(row.scores["target"]), p, names) for row, p in zip(like, probs_NK, strict=True)]
    return [CaseRow(member=name, case=row.case, part=row.part, scores=s) for row, s in zip(like, scores, strict=True)]


def _baseline_rows(cache: ImageCache, recipe: ClsRecipe, split: Split) -> list[CaseRow]:
    images, targets, classes = select(cache, recipe.data.cancer)
    place = {cache.ids[n]: k for k, n in enumerate(images)}
    train, test = ([place[case] for case in cases] for cases in (split.train, split.test))
    histogram = cache.histogram[images]
    probs = baseline.histogram_probs(histogram[train], targets[train], histogram[test], len(classes))
    scores = [metrics.row_scores(int(target), p, classes) for target, p in zip(targets[test], probs, strict=True)]
    return [CaseRow(member=baseline.NAME, case=case, part="test", scores=s)
            for case, s in zip(split.test, scores, strict=True)]  # fmt: skip


def _about(line: Line, table: CancerTable) -> list[str]:
    """The cells under ABOUT."""
    leaked = table.leaked if line.leaked is None else line.leaked
    return [str(len(line.rows)) if line.rows else "–", table.split, str(leaked), line.epochs, line.note]


def _cells(line: Line, names: Iterable[str]) -> list[str]:
    """Scores for people; a dash where there is none."""
    return [f"{line.scores[name]:.3f}" if name in line.scores else "–" for name in names]


def _bracketed(scores: Mapping[str, float], names: Iterable[str]) -> list[str]:
    """Scores as 0.855 (0.77–0.93) where there is an interval."""
    cells = []
    for name in names:
        low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
        interval = "" if low is None else f" ({low:.2f}–{high:.2f})"
        cells.append(f"{scores[name]:.3f}{interval}" if name in scores else "–")
    return cells


def _rules(table: CancerTable) -> str:
    """What the columns of a cancer's table mean."""
    area = f"of {table.positive}" if table.positive else "the mean of each class against all others"
    rules = (
        f"{table.cancer}, test images. Recall, precision and F1 are macro means over classes, AUROC is {area}. "
        f"{BRACKETS} 'duplicates across': test images with a near-duplicate among the training images."
    )
    if table.related > table.leaked:
        rules += f" {table.related} test images are of a patient with images in training, or near-duplicates."
    if table.positive:
        rules += f" Sensitivity and specificity at 0.5, and 'positive' in table.csv, are of {table.positive}."
    return rules


def _write_cancer(place: Path, table: CancerTable, foot: Sequence[str], published: Sequence[Published]) -> None:
    shown = {head: name for head, name in SCORES.items() if table.positive or name not in OF_POSITIVE}
    lines = [[line.member, *_bracketed(line.scores, shown.values()), *_about(line, table)] for line in table.lines]
    write_text(place / "table.md", to_markdown([("member", *shown, *ABOUT), *lines], [_rules(table), *foot]))
    long = [["member", *LONG, "positive", *ABOUT]]
    for line in table.lines:
        values = [f"{line.scores[name]:.6f}" if name in line.scores else "" for name in LONG]
        long.append([line.member, *values, table.positive, str(len(line.rows)), *_about(line, table)[1:]])
    write_text(place / "table.csv", to_csv(long))
    write_rows(place / "cases.csv", [row for line in table.lines for row in line.rows])
    for line in table.lines:
        if line.rows:
            target, probs = metrics.arrays(line.rows)
            counts = metrics.confusion(target, probs.argmax(1), len(table.classes))
            name = f"confusion_{slug(line.member)}"
            write_text(place / f"{name}.csv", to_csv([["true \\ predicted", *table.classes], *(
                [c, *row] for c, row in zip(table.classes, counts.tolist(), strict=True))]))  # fmt: skip
            title = f"{line.member}: accuracy {line.scores['accuracy']:.3f}"
            figures.write_confusion(place / f"{name}.png", counts, table.classes, title)
    same = [p for p in published if (p.cancer, p.split) == (table.cancer, table.split)]
    bars = [(line.member, line.scores["accuracy"], _colour(line.member)) for line in table.lines if line.rows]
    bars += [(f"{p.member}, as published", p.accuracy, figures.PUBLISHED) for p in same]
    title = f"{table.cancer}, {table.split} split, {table.leaked} test images have a near-duplicate in training"
    figures.write_bars(place / "accuracy.png", bars, title)


def _colour(member: str) -> str:
    if member == baseline.NAME:
        return figures.BASELINE
    return figures.ENSEMBLE if member in ENSEMBLES else figures.MEMBER


def _write_overview(sweep: Path, tables: Sequence[CancerTable], audit: Sequence[Sequence[object]],
                    foot: Sequence[str]) -> None:  # fmt: skip
    # the means of several members are notes below
    shown = [line for table in tables for line in table.lines if line.rows or line.failed]
    members = list(dict.fromkeys(line.member for line in shown))
    head = ["accuracy on test images", *(table.cancer for table in tables)]
    found = [{line.member: line.scores for line in table.lines} for table in tables]
    lines = [[m, *(_bracketed(f.get(m, {}), ["accuracy"])[0] for f in found)] for m in members]
    lines.append(["test images", *(str(max(len(line.rows) for line in table.lines)) for table in tables)])
    lines.append(["with a near-duplicate in training", *(str(table.leaked) for table in tables)])
    long = [["cancer", "member", *SCORES, *LIMITS, "positive", *ABOUT]]
    names = (*SCORES.values(), *LIMITS)
    long += [[table.cancer, line.member, *_cells(line, names), table.positive, *_about(line, table)]
             for table in tables for line in table.lines]  # fmt: skip
    splits = ", ".join(dict.fromkeys(table.split for table in tables))
    rules = (
        f"Split by {splits}. Each cancer's own table with recall, precision and F1 is in tables/. Ensemble "
        f"weights come from validation images. {BRACKETS}"
    )
    failed = [f"{t.cancer}: {line.member} {line.note}." for t in tables for line in t.lines if not line.rows]
    notes = [rules, *foot, *failed]
    text = to_markdown([head, *lines], notes) + "\n" + to_markdown(audit)
    write_text(sweep / "table.md", text)
    write_text(sweep / "table.csv", to_csv(long))


def _foot(cache: ImageCache) -> list[str]:
    facts = cache.facts
    notes = []
    if facts["bad"]:
        names = ", ".join(path for path, _ in facts["bad"][:5])
        notes.append(f"{len(facts['bad'])} of {facts['files']} files could not be read and were set aside (all in "
                     f"{listing_of(cache.path).name}): {names}"
                     + (" …" if len(facts["bad"]) > 5 else "."))  # fmt: skip
    if facts["conflicts"]:
        notes.append(f"{len(facts['conflicts'])} images lie under more than one class.")
    return notes
