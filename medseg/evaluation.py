"""Scores of trained members and of their mean on a labelled cohort that none of them needs to have come from."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from medseg.cases import patient_of
from medseg.cohort import CacheCohort, Cohort, ScanCohort
from medseg.geometry import paste
from medseg.kept import Kept, Scores, weights_of
from medseg.members import Member, load_members, native_probs
from medseg.metrics import score_case
from medseg.nifti import Unreadable
from medseg.prediction import LISTING
from medseg.table import RULES, Line, write_tables
from medtrain.aside import Aside, report
from medtrain.ensemble import weighted_mean
from medtrain.errors import UserError
from medtrain.files import read_json
from medtrain.paths import spelt
from medtrain.progress import track
from medtrain.results import CaseRow, write_rows
from medtrain.run_folder import SPLIT
from medtrain.trained import default_device
from medtrain.wording import plain, shown

ENSEMBLE = "Ensemble"
PART = "cohort"
KEPT = "evaluation.jsonl"  # while it is not complete


def evaluate(runs: Sequence[Path], place: Path, prepared: bool, label_map: str, out: Path) -> int:
    """Judge members and, of several, their mean with equal weights on every labelled case; writes cases.csv, table.csv
    and table.md into `out`, and returns how many cases could not be used: they are listed in set_aside.csv there. Where
    it was cut off, another call goes on.

    `place` is a data folder, read under `label_map`, or, if `prepared`, a cache. Cases with the name of one that a
    member has seen are counted in the table and in a warning. Raises UserError; `out` then holds no new tables.
    """
    names = _names(runs)
    splits = {name: _split(run) for name, run in zip(names, runs, strict=True)}
    cohort: Cohort = CacheCohort(place) if prepared else ScanCohort(place, label_map)
    about = [names, weights_of(runs), str(place.absolute()), cohort.label_map.to_dict()]
    members = load_members(runs, default_device())
    for run, member in zip(runs, members, strict=True):
        cohort.check(run, member)
    _check_coding(cohort, members[0])
    out.mkdir(parents=True, exist_ok=True)  # before hours of work
    named = dict(zip(names, members, strict=True))
    kept = Kept(out / KEPT, about)
    rows, aside = _all_rows(cohort, named, kept)
    report(aside, out / LISTING, "case", root=place.parent if prepared else place)
    if not rows:
        raise UserError(f"no case of {spelt(place)} can be used: do what {out / LISTING} says of them.")
    rows.sort(key=lambda row: [*names, ENSEMBLE].index(row.member))
    ids = [row.case for row in _of(names[0], rows)]
    seen = {name: _seen([split], ids) for name, split in splits.items()}
    lines = [
        Line.of(name, _of(name, rows), member.label_map.name, str(member.recipe.train.epochs), seen[name])
        for name, member in named.items()
    ]
    if len(named) > 1:
        note = "; ".join(filter(None, [f"equal weights of {', '.join(names)}", _seen([*splits.values()], ids)]))
        lines.append(Line.of(ENSEMBLE, _of(ENSEMBLE, rows), members[0].label_map.name, "", note))
    write_rows(out / "cases.csv", rows)
    write_tables(out, lines, [_rules(cohort, len(ids))])
    kept.path.unlink(missing_ok=True)  # the tables are complete
    for name, words in seen.items():
        if words:
            print(f"WARNING: {name}, by the cases' names: {words}.", file=sys.stderr)
    return len(aside)


def _all_rows(cohort: Cohort, members: Mapping[str, Member], kept: Kept) -> tuple[list[CaseRow], list[Aside]]:
    """The rows of every case that can be used, and the others with their reasons; what a call that was cut off has
    left is taken as it is.
    """
    found = {case: kept.get(case, cohort.stamp(case)) for case in cohort.ids}
    todo = [case for case, scores in found.items() if not scores]
    if len(todo) < len(found):
        print(f"{len(found) - len(todo)} of {len(found)} cases are judged already", flush=True)
    aside: list[Aside] = []
    for case in track(todo, len(todo), "evaluate"):
        stamp = cohort.stamp(case)
        try:
            found[case] = _judged(cohort, case, members)
        except Unreadable:  # not the case's fault
            raise
        except UserError as error:
            aside.append((case, str(error)))
        else:
            kept.add(case, found[case] or {}, stamp)
    judged = {case: scores for case, scores in found.items() if scores}
    rows = [CaseRow(member=member, case=case, part=PART, scores=scores[member])
            for case, scores in judged.items() for member in scores]  # fmt: skip
    return rows, aside


def _of(name: str, rows: Sequence[CaseRow]) -> list[CaseRow]:
    return [row for row in rows if row.member == name]


def _rules(cohort: Cohort, count: int) -> str:
    codes = f"label map {cohort.label_map.name}"
    name = os.path.basename(os.path.abspath(cohort.origin))  # the folders around it may bear a patient's
    return (
        f"{RULES} Judged on {count} of {len(cohort.ids)} labelled cases of {shown(name)} ({codes}). Which "
        "of them a member has seen before is told by their names, which differ between releases: the Decathlon's cases "
        "are of BraTS 2016 and 2017, those of UPENN-GBM and UCSF-PDGM are in BraTS 2021, too."
    )


def _names(runs: Sequence[Path]) -> list[str]:
    """What the table calls each member: its folder's name, or its path where two are named alike."""
    places = [run.resolve() for run in runs]
    twice = next((run for run, place in zip(runs, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice in --members: leave one out.")
    short = [place.name for place in places]
    alike = len(set(short)) < len(short) or ENSEMBLE in short
    names = [str(place) if alike else name for place, name in zip(places, short, strict=True)]
    for name in names:
        if not plain(name):
            raise UserError(f"{shown(name)} can be no name in a table: rename the folder.")
    return names


def _split(run: Path) -> Mapping[str, set[str]] | None:
    """The names of the cases that a run was trained on and chosen by; None where it does not tell."""
    path = run / SPLIT
    if not path.exists():
        return None
    split = read_json(path)
    parts = {part: split.get(part) for part in ("train", "val")}
    if not all(isinstance(ids, list) and all(isinstance(case, str) for case in ids) for ids in parts.values()):
        raise UserError(f"{path} is damaged: take it from an intact copy, or remove it.")
    return {part: set(ids) for part, ids in parts.items()}  # type: ignore[arg-type]


def _seen(splits: Sequence[Mapping[str, set[str]] | None], ids: Sequence[str]) -> str:
    """How many cases one of some members was trained on, how many others are of patients that it was trained on by
    their names, and how many chose its checkpoint, in words.
    """
    known = [split for split in splits if split is not None]
    train, val = (set[str]().union(*(split[part] for split in known)) for part in ("train", "val"))
    patients = {patient_of(case) for case in train}
    trained, related, chose = "were in training", "are of patients in training", "chose the checkpoint"
    counts = Counter(
        trained if case in train else related if patient_of(case) in patients else chose if case in val else ""
        for case in ids
    )
    words = [f"{counts[what]} of {len(ids)} cases {what}" for what in (trained, related, chose) if counts[what]]
    words += ["seen cases unknown (no split.json)"] if len(known) < len(splits) else []
    return ", ".join(words)


def _check_coding(cohort: Cohort, member: Member) -> None:
    """Codes of the same tissues can be mapped; those of the legacy reading are of other tissues."""
    ours, theirs = cohort.label_map, member.label_map
    if ours != theirs and "legacy" in (ours.name, theirs.name):
        raise UserError(
            f"{spelt(cohort.origin)} is read under label map {ours.name}, the members were trained under "
            f"{theirs.name}: legacy may call another tissue enhancing tumour, so read both under one --label-map."
        )


def _judged(cohort: Cohort, case: str, members: Mapping[str, Member]) -> Scores:
    """The scores of one case: each member's and, of several, those of their mean."""
    labelled = cohort.read(case)
    first = next(iter(members.values()))
    label_map = first.label_map
    reference = cohort.label_map.recode(labelled.reference, label_map)
    scores: dict[str, dict[str, float]] = {}

    def judge(name: str, probs_KDHW: np.ndarray) -> None:
        label = label_map.label(probs_KDHW)
        if labelled.whole:
            label = paste(label, labelled.prepared(first.preparation)[1])
        scores[name] = score_case(label, reference, label_map, labelled.spacing_mm)

    def each() -> Iterator[np.ndarray]:
        for name, probs in zip(members, native_probs(list(members.values()), labelled.prepared), strict=True):
            judge(name, probs)
            yield probs

    mean = weighted_mean(each(), [1.0] * len(members))
    if len(members) > 1:
        judge(ENSEMBLE, mean)
    return scores
