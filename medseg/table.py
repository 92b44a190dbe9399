"""The ensemble's rows and the table of a sweep: members, ensemble, failures with their reason."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from medseg.cache import Cache
from medseg.figures import overlay, write_box_plot, write_overlay
from medseg.kept import Kept, weights_of
from medseg.labels import REGIONS
from medseg.members import Member, load_members, native_probs
from medseg.metrics import DICE, HD95, score_case
from medseg.task import SegTask
from medtrain.aside import listing_of
from medtrain.ensemble import weighted_mean, weights_from
from medtrain.errors import UserError
from medtrain.files import write_text
from medtrain.progress import track
from medtrain.results import CaseRow, intervals, means, read_rows, write_rows
from medtrain.run_folder import DONE, ROWS, check_some_done, check_trained_on, is_done, read_done, why_missing
from medtrain.tables import to_csv, to_markdown
from medtrain.trained import default_device
from medtrain.wording import shown

SCORES = ("Dice mean", *REGIONS, *HD95)
BOUNDS = tuple(f"{name} {end}" for name in SCORES[: len(DICE)] for end in ("low", "high"))
TOLD = ("label map", "cases", "epochs", "note")
PICTURES = 8  # of a member that is in no ensemble, whose cases have been predicted before
RULES = (
    "Dice and HD95 (mm) on the original spacing, mean over cases. Empty reference and empty prediction count 1 and "
    "0 mm; where only one of them is empty, 0 and 373.13 mm. In brackets the 95 % bootstrap interval over cases, "
    "too narrow for few of them (of five it covers about 82 %); those of the regions stand in table.csv."
)


@dataclass(frozen=True)
class Line:
    """A line of the table: means over cases with the intervals of Dice, what is told beside them, and a note; a member
    that failed has its note only.
    """

    member: str
    note: str
    scores: Mapping[str, float] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    told: tuple[str, str, str] = ("–", "–", "–")  # label map, cases, epochs

    @classmethod
    def of(cls, member: str, rows: Sequence[CaseRow], label_map: str, epochs: str, note: str) -> Self:
        """The line of a member's or an ensemble's rows."""
        return cls(member, note, means(rows), intervals(rows, DICE), (label_map, str(len(rows)), epochs))

    def numbers(self) -> list[str]:
        """The cells of Dice and HD95; a score that a run of an earlier version lacks is empty."""
        if not self.scores:
            return ["–"] * len(SCORES)
        distances = [f"{self.scores[key]:.2f}" if key in self.scores else "" for key in HD95]
        return [*(f"{self.scores[key]:.3f}" for key in DICE), *distances]


@dataclass(frozen=True)
class Entry:
    """A member of the sweep: its name in the tables, its run folder, and what done.json holds once it is done."""

    label: str
    recipe: str
    run: Path
    done: dict[str, Any] | None

    @cached_property
    def rows(self) -> list[CaseRow]:
        """Its cases under its own name; none while it is not done."""
        return [replace(row, member=self.label) for row in read_rows(self.run / ROWS, DICE)] if self.done else []


def finish(sweep: Path, cache: Path, members: Sequence[dict[str, Any]], weights: str = "equal") -> int:
    """Make the ensemble of the finished runs, the tables and the figures; returns how many members are missing.

    `members` are plan.json's. Members judged on the same cases are averaged together; with folds that is an ensemble a
    fold, and every case is predicted by networks that did not see it.
    """
    check_some_done(sweep, members)
    entries = [_entry(sweep, member) for member in members]
    done = [entry for entry in entries if entry.done]
    rows = [row for entry in done for row in entry.rows]
    if not rows:
        raise UserError(f"{sweep}: the recipes hold out no case to judge by: --set data.val_fraction=0.2.")
    opened = Cache(cache)
    for entry in done:
        check_trained_on(entry.run, opened)
        unknown = {row.case for row in entry.rows} - set(opened.ids)
        if unknown:
            raise UserError(f"{entry.run / 'cases.csv'} tells of {shown(min(unknown), 60)!r}, which {cache} has not: "
                            "train that run again.")  # fmt: skip
    part = done[0].done["part"]  # type: ignore[index]
    together = _ensembles(sweep, opened, done, weights, part)
    write_rows(sweep / "cases.csv", [*rows, *together])
    lines = [_line(entry) for entry in entries] + _spread(done)
    if together:
        lines.append(Line.of("Ensemble", together, done[0].done["label_map"], "", _holds(weights, entries)))  # type: ignore[index]
    judged = "test cases" if part == "test" else "validation cases, which also chose each member's checkpoint"
    listing = listing_of(cache)
    aside = f" Cases that could not be used are listed in {listing.name}." if listing.is_file() else ""
    write_tables(sweep, lines, [RULES + f" Judged on {judged}.{aside}"])
    write_box_plot(sweep / "figures" / "dice.png", [*rows, *together])
    return len(entries) - len(done)


def _entry(sweep: Path, member: dict[str, Any]) -> Entry:
    run = sweep / member["folder"]
    done = read_done(run / DONE, part=str, label_map=str, epochs=int) if is_done(run) else None
    return Entry(member["label"], member["recipe"], run, done)


def _ensembles(sweep: Path, cache: Cache, done: Sequence[Entry], weights: str, part: str) -> list[CaseRow]:
    """The ensembles' rows, and a picture a case; members that are alone have no rows here and a few pictures."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in done:
        groups.setdefault(tuple(sorted(row.case for row in entry.rows)), []).append(entry)
    alone = all(len(group) == 1 for group in groups.values())
    device = default_device()
    together: list[CaseRow] = []
    for group in groups.values():
        members = load_members([entry.run for entry in group], device)
        factors = [1.0] if alone else _weights(members, weights, part, sweep)
        task = SegTask(members[0].recipe, cache)
        _check_cases(group[0], task)
        cases = [row.case for row in group[0].rows][: PICTURES if alone else None]
        name = group[0].label if alone else "Ensemble"
        about = [weights_of([entry.run for entry in group]), factors, cache.fingerprint]
        kept = Kept(sweep / "ensemble.jsonl", about)
        scores = _scores(task, members, factors, cases, kept, sweep / "figures", name)
        together += [CaseRow(member=name, case=case, part=part, scores=scores[case]) for case in cases]
    return [] if alone else together


def _check_cases(entry: Entry, task: SegTask) -> None:
    """An older run may have been judged on cases that its recipe would train on today."""
    if {row.case for row in entry.rows} != set(task.split.test or task.split.val):
        raise UserError(f"{entry.run} was judged on other cases than its recipe holds out of {task.cache.path} today: "
                        "train it again, in another folder.")  # fmt: skip


def _holds(weights: str, entries: Sequence[Entry]) -> str:
    held = [entry.label for entry in entries if entry.done]
    missing = [entry.label for entry in entries if not entry.done]
    names = ", ".join(held) if len(held) <= 8 else f"{len(held)} members"
    return f"{weights} weights of {names}" + (f"; without {', '.join(missing)}" if missing else "")


def _spread(done: Sequence[Entry]) -> list[Line]:
    """A line a recipe that several members share: their mean, and the standard deviation of their mean Dice."""
    lines: list[Line] = []
    for name in dict.fromkeys(entry.recipe for entry in done):
        mine = [means(entry.rows) for entry in done if entry.recipe == name]
        if len(mine) > 1:
            known = [key for key in (*DICE, *HD95) if all(key in scores for scores in mine)]
            mean = {key: float(np.mean([scores[key] for scores in mine])) for key in known}
            note = f"standard deviation {np.std([scores['mean'] for scores in mine], ddof=1):.3f}"
            lines.append(Line(f"{name}, mean of {len(mine)}", note, mean, told=("", "", "")))
    return lines


def _weights(members: Sequence[Member], how: str, part: str, sweep: Path) -> list[float]:
    if how == "validation" and part != "test":
        raise UserError(
            f"{sweep}: weights from validation would be judged on the cases they come from: "
            "--set data.test_fraction=0.2, or take equal weights."
        )
    try:
        return weights_from({f"{i} {member.name}": member.score for i, member in enumerate(members)}, how)
    except ValueError as error:
        raise UserError(f"{sweep}: {error}: --set data.val_fraction=0.2.") from None


def _scores(task: SegTask, members: Sequence[Member], weights: Sequence[float], cases: Sequence[str],
            kept: Kept, figures: Path, name: str) -> dict[str, Mapping[str, float]]:  # fmt: skip
    """Scores of each case, with a picture; what an earlier call has left of both is taken as it is."""
    found = {case: kept.get(case) for case in cases}
    scores = {case: told[name] for case, told in found.items()
              if told and name in told and (figures / f"{case}.png").is_file()}  # fmt: skip
    todo = [case for case in cases if case not in scores]
    if len(todo) < len(cases):
        print(f"{len(cases) - len(todo)} of {len(cases)} cases are predicted already", flush=True)
    for case in track(todo, len(todo), "ensemble" if len(members) > 1 else "pictures"):
        image, grid, reference = task.cache.read(case, "image"), task.grid(case), task.reference(case)
        probs = native_probs(members, dict.fromkeys((m.preparation for m in members), (image, grid)).__getitem__)
        label = task.label_map.label(weighted_mean(probs, weights))
        scores[case] = score_case(label, reference, task.label_map, grid.voxel_mm)
        title = f"{case}: {name} Dice " + ", ".join(f"{r} {scores[case][r]:.2f}" for r in REGIONS)
        write_overlay(figures / f"{case}.png", overlay(task.flair(case), reference, label, task.label_map), title)
        kept.add(case, {name: scores[case]})
    return scores


def _line(entry: Entry) -> Line:
    if entry.done is None:
        return Line(entry.label, f"failed: {why_missing(entry.run)}")
    return Line.of(entry.label, entry.rows, entry.done["label_map"], str(entry.done["epochs"]), "")


def write_tables(place: Path, lines: Sequence[Line], notes: Sequence[str]) -> None:
    """Write table.csv, with the intervals as columns of their own, and table.md, with notes below."""
    plain = [["member", *SCORES, *BOUNDS, *TOLD]]
    pretty = [["member", *SCORES, *TOLD]]
    for line in lines:
        first, *others = line.numbers()
        ends = [f"{end:.3f}" for key in DICE for end in line.bounds[key]] if line.bounds else [""] * len(BOUNDS)
        plain.append([line.member, first, *others, *ends, *line.told, line.note])
        if line.bounds:
            low, high = line.bounds["mean"]
            first += f" ({low:.2f}–{high:.2f})"
        pretty.append([line.member, first, *others, *line.told, line.note])
    write_text(place / "table.csv", to_csv(plain))
    write_text(place / "table.md", to_markdown(pretty, notes))
