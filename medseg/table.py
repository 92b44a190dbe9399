"""The ensemble's rows and the table of a sweep: members, ensemble, failures with their reason."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medseg.figures import overlay, write_box_plot, write_overlay
from medseg.labels import REGIONS
from medseg.members import Member, load_members
from medseg.metrics import score_case
from medseg.task import SegTask
from medtrain.cache import Cache
from medtrain.ensemble import weighted_mean, weights_from
from medtrain.errors import UserError
from medtrain.files import read_json, write_text
from medtrain.progress import track
from medtrain.results import CaseRow, means, read_rows, to_csv, to_markdown, write_rows

HEAD = ("member", "Dice mean", *REGIONS, "label map", "cases", "epochs", "note")
RULES = (
    "Dice on the original spacing, mean over cases. Empty reference and empty prediction count 1, empty reference "
    "and non-empty prediction 0."
)


def finish(sweep: Path, cache: Path, runs: Sequence[Path], weights: str = "equal") -> int:
    """Make the ensemble of the finished runs, the tables and the figures; returns how many members are missing."""
    done = {run: read_json(run / "done.json") for run in runs if _is_done(run)}
    if not done:
        raise UserError(f"{sweep} has no finished member: look at {sweep / 'jobs'} for the reason, then run it again.")
    rows = [row for run in done for row in read_rows(run / "cases.csv")]
    if not rows:
        raise UserError(f"{sweep}: the recipes hold out no case to judge by: --set data.val_fraction=0.2.")
    opened = Cache(cache)
    for run in done:
        if read_json(run / "cache.json").get("fingerprint") != opened.fingerprint:
            raise UserError(f"{run} was trained on other data than {cache} holds: train it again in another folder.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    members = load_members(list(done), device)
    part = next(iter(done.values()))["part"]
    factors = _weights(members, weights, part, sweep)
    first = SegTask(members[0].recipe, opened)
    together = _ensemble_rows(first, members, factors, part, sweep / "figures") if len(done) > 1 else []
    write_rows(sweep / "cases.csv", [*rows, *together])
    lines = [_line(run, done.get(run), read_rows(run / "cases.csv") if run in done else []) for run in runs]
    if together:
        names = ", ".join(member.name for member in members)
        lines.append(_cells("Ensemble", together, members[0].label_map.name, "", f"{weights} weights of {names}"))
    judged = "test cases" if part == "test" else "validation cases, which also chose each member's checkpoint"
    write_text(sweep / "table.csv", to_csv([HEAD, *lines]))
    write_text(sweep / "table.md", to_markdown([HEAD, *lines], [RULES + f" Judged on {judged}."]))
    write_box_plot(sweep / "figures" / "dice.png", [*rows, *together])
    return len(runs) - len(done)


def _is_done(run: Path) -> bool:
    return (run / "done.json").is_file() and (run / "cases.csv").is_file()


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


def _ensemble_rows(task: SegTask, members: Sequence[Member], weights: Sequence[float], part: str,
                   figures: Path) -> list[CaseRow]:  # fmt: skip
    rows = []
    cases = task.split.test or task.split.val
    for case in track(cases, len(cases), "ensemble"):
        image, grid, reference = task.cache.read(case, "image"), task.grid(case), task.reference(case)
        label = task.label_map.label(weighted_mean((m.native_probs(image, grid) for m in members), weights))
        scores = score_case(label, reference, task.label_map)
        rows.append(CaseRow(member="Ensemble", case=case, part=part, scores=scores))
        title = f"{case}: ensemble Dice " + ", ".join(f"{r} {scores[r]:.2f}" for r in REGIONS)
        write_overlay(figures / f"{case}.png", overlay(task.flair(case), reference, label, task.label_map), title)
    return rows


def _line(run: Path, done: dict[str, Any] | None, rows: list[CaseRow]) -> list[str]:
    if done is None:
        failed = run / "failed.json"
        reason = read_json(failed).get("reason") if failed.is_file() else "did not finish"
        return [run.name.rsplit("-", 1)[0], *["–"] * 4, "–", "–", "–", f"failed: {reason}"]
    return _cells(done["recipe"], rows, done["label_map"], str(done["epochs"]), "")


def _cells(name: str, rows: Sequence[CaseRow], label_map: str, epochs: str, note: str) -> list[str]:
    scores = means(rows)
    values = [f"{scores[key]:.3f}" for key in ("mean", *REGIONS)]
    return [name, *values, label_map, str(len(rows)), epochs, note]
