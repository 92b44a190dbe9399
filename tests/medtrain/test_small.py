"""Ema, schedule, ensemble, results, files, errors, progress, checkpoint: the small rooms."""

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from medtrain import checkpoint
from medtrain.ema import Ema
from medtrain.ensemble import weighted_mean, weights_from
from medtrain.errors import UserError, exit_code, out_of_memory
from medtrain.files import beside, remove_leftovers, replacing, write_json
from medtrain.progress import Progress, duration
from medtrain.recipe import Optim, Recipe
from medtrain.results import CaseRow, intervals, means, read_rows, write_rows
from medtrain.schedule import learning_rate
from medtrain.tables import to_markdown
from medtrain.tracker import Tracker


def test_ema_follows_its_formula_and_swaps_back() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 0.0)
    ema = Ema(model, 0.5)
    expected = 0.0
    for step, value in enumerate([1.0, 2.0, 4.0], 1):
        torch.nn.init.constant_(model.weight, value)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    with ema.applied():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 4.0
    assert ema.state()[0].item() == pytest.approx(expected)


def test_schedules() -> None:
    optim = Optim(lr=1.0, schedule="poly_epoch", power=0.9)
    assert [learning_rate(optim, s, 100, 10) for s in (0, 9)] == [1.0, 1.0]
    assert learning_rate(optim, 10, 100, 10) == pytest.approx((1 - 1 / 10) ** 0.9)
    assert learning_rate(optim, 99, 100, 10) == pytest.approx((1 - 9 / 10) ** 0.9)
    assert learning_rate(Optim(lr=1.0, schedule="poly"), 50, 100, 10) == pytest.approx(0.5**0.9)
    assert learning_rate(Optim(lr=1.0, schedule="cosine"), 50, 100, 10) == pytest.approx(0.5)
    assert learning_rate(Optim(lr=1.0, schedule="constant", warmup_steps=3), 1, 100, 10) == pytest.approx(0.5)
    assert learning_rate(Optim(lr=1.0, schedule="constant"), 99, 100, 10) == 1.0


def test_weighted_mean_equals_numpy() -> None:
    members = [np.random.default_rng(i).random((3, 4, 5)).astype(np.float32) for i in range(3)]
    combined = weighted_mean(iter(members), [1, 2, 3])
    np.testing.assert_allclose(combined, np.average(members, axis=0, weights=[1, 2, 3]), rtol=1e-6)
    with pytest.raises(ValueError, match="2 predictions"):
        weighted_mean(iter(members[:2]), [1, 1, 1])
    with pytest.raises(ValueError, match="weights"):
        weighted_mean(iter(members), [0, 0, 0])
    with pytest.raises(ValueError, match="shape"):
        weighted_mean(iter([members[0], members[1][1:]]), [1, 1])


def test_validation_weights_need_validation_scores() -> None:
    assert weights_from({"a": 0.5, "b": 0.25}, "validation") == [0.5, 0.25]
    assert weights_from({"a": None, "b": 0.25}, "equal") == [1.0, 1.0]
    with pytest.raises(ValueError, match="member a"):
        weights_from({"a": None, "b": 0.25}, "validation")


def test_intervals_are_percentiles_of_means_of_drawn_cases() -> None:
    values = np.random.default_rng(1).uniform(0.5, 1, (12, 2))
    rows = [CaseRow(member="m", case=f"c{n:02}", part="val", scores={"mean": a, "TC": b, "x": 9.0})
            for n, (a, b) in enumerate(values)]  # fmt: skip
    found = intervals(rows, ("mean", "TC"))
    draws = np.random.default_rng(0).integers(0, 12, (1000, 12))
    for column, name in enumerate(("mean", "TC")):
        drawn = values[draws, column].mean(1)
        assert found[name] == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))), abs=1e-12)
        low, high = found[name]
        assert low < values[:, column].mean() < high
        assert high - low == pytest.approx(2 * 1.96 * values[:, column].std() / 12**0.5, rel=0.1)
    assert intervals(rows[::-1], ("mean", "TC")) == found  # whatever the order
    assert intervals(rows[:1], ("mean", "TC")) == intervals([], ("mean",)) == {}
    same = [CaseRow(member="m", case=c, part="val", scores={"mean": 0.5}) for c in "ab"]
    assert intervals(same, ("mean",)) == {"mean": (0.5, 0.5)}


def test_numbers_with_an_interval_stand_on_the_right() -> None:
    text = to_markdown([["member", "Dice mean"], ["a", "0.870 (0.83–0.90)"], ["b", "–"], ["c", "0.1"]])
    assert text.splitlines()[1].endswith(":|")
    assert text.splitlines()[3].endswith("  – |")


def test_rows_round_trip_and_means(tmp_path: Path) -> None:
    rows = [CaseRow(member="m, x", case=f"ü{i}", part="val", scores={"mean": i / 3, "TC": 1.0}) for i in range(3)]
    write_rows(tmp_path / "cases.csv", rows)
    read = read_rows(tmp_path / "cases.csv")
    assert [(r.member, r.case) for r in read] == [(r.member, r.case) for r in rows]
    assert means(read) == pytest.approx({"mean": 1 / 3, "TC": 1.0})
    assert means([]) == {}
    more = [CaseRow(member="n", case="a", part="val", scores={"mean": 0.5, "TC": 0.5, "HD95 TC": 2.25})]
    write_rows(tmp_path / "cases.csv", [*rows, *more])
    assert (tmp_path / "cases.csv").read_text().splitlines()[1].endswith(",0,1,")  # nothing where nothing was measured
    mixed = read_rows(tmp_path / "cases.csv", ("mean", "TC"))
    assert [dict(row.scores) for row in mixed[3:]] == [more[0].scores]
    assert list(means(mixed)) == ["mean", "TC"]
    with pytest.raises(UserError, match=r"cases\.csv"):
        read_rows(tmp_path / "cases.csv", ("mean", "HD95 TC"))
    (tmp_path / "cases.csv").write_text("member,case,part,mean,TC\nm,a,val,1,1\nm,b,val,1,\n")
    with pytest.raises(UserError, match=r"cases\.csv"):
        read_rows(tmp_path / "cases.csv")
    (tmp_path / "cases.csv").write_text("member,case\nx")
    with pytest.raises(UserError, match=r"cases\.csv"):
        read_rows(tmp_path / "cases.csv")


def test_markdown_aligns_numbers_to_the_right() -> None:
    text = to_markdown([("member", "Dice"), ("a|b", "0.5")], ["foot"])
    assert text == "| member | Dice |\n|--------|-----:|\n| a\\|b   |  0.5 |\n\nfoot\n"


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    write_json(target, {"a": 1})
    with pytest.raises(TypeError, match="str"), replacing(target) as temporary:
        temporary.write_text(b"half")  # type: ignore[arg-type]
    assert json.loads(target.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_processes_of_one_number_write_beside_each_other(tmp_path: Path) -> None:
    """As in containers on several nodes; what killed ones left is removed."""
    target = tmp_path / "x.json"
    with replacing(target) as one, replacing(target) as two:
        assert one != two
        one.write_text("1")
        two.write_text("2")
    assert target.read_text() == "1"
    for name in (".12.x.json", ".12-0123abcd.x.json", ".12-0123abcd.y.json", ".12-other.x.json", ".x.json"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path, "x.json")
    assert {p.name for p in tmp_path.iterdir()} == {"x.json", ".12-0123abcd.y.json", ".12-other.x.json", ".x.json"}
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"x.json", ".12-other.x.json", ".x.json"}
    beside(target).write_text("")
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"x.json", ".12-other.x.json", ".x.json"}


def _raise(error: BaseException):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("x.h5 is not there: make it."), 2, "error: x.h5 is not there"),
        (OSError(28, "No space left on device", "/data/c.h5"), 2, "no space left while writing /data/c.h5"),
        (RuntimeError("boom"), 1, "Traceback"),
        (OSError(5, "Input/output error"), 1, "Traceback"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(_raise(error)) == code
    err = capsys.readouterr().err
    assert words in err
    assert ("Traceback" in err) == (code == 1)


def test_progress_prints_plain_lines_with_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(2, "prepare", every_s=0)
    progress.advance("case a")
    progress.advance("case b")
    out = capsys.readouterr().out
    assert "prepare: 1/2, 0 s left, case a" in out
    assert "prepare: 2/2, took 0 s, case b" in out
    assert [duration(s) for s in (5, 185, 7800)] == ["5 s", "3 min 05 s", "2 h 10 min"]


class Bomb:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_checkpoint_runs_no_code_and_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / "good.pt"
    checkpoint.save(good, {"model": {"w": torch.ones(3)}, "score": math.inf})
    assert checkpoint.load(good)["model"]["w"].sum() == 3
    evil = tmp_path / "evil.pt"
    torch.save({"model": Bomb()}, evil)
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps(Bomb()))
    cut = tmp_path / "cut.pt"
    cut.write_bytes(good.read_bytes()[:200])
    other = tmp_path / "other.pt"
    torch.save({"weights": 1}, other)
    for path in (evil, plain, cut, other, tmp_path / "absent.pt"):
        with pytest.raises(UserError, match=path.name):
            checkpoint.load(path)
    assert "executed" not in capsys.readouterr().out


def test_tracker_drops_lines_that_a_resumed_run_will_write_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 5, "a": 2}\n{"step": 6, "a"')
    tracker = Tracker(tmp_path, Recipe(name="r", task="t"), active=True, step=4, total=9)
    tracker.scalars(5, {"train/loss": 0.5})
    tracker.close({"best": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "a": 1}, {"step": 5, "train/loss": 0.5}]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "GPU"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "GPU"),
        (MemoryError(), "host"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "host"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ""),
    ],
)
def test_what_memory_errors_look_like(error: Exception, kind: str) -> None:
    assert out_of_memory(error) == kind
