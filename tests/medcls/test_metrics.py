"""Scores equal scikit-learn's own functions, and the corner cases are what the docstring says."""

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn import metrics as reference

from medcls.metrics import arrays, auroc, confusion, intervals, row_scores, summarize
from medtrain.results import CaseRow


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_scores_equal_scikit_learn(classes: int) -> None:
    rng = np.random.default_rng(classes)
    target = rng.integers(0, classes, 200)
    probs = rng.dirichlet(np.ones(classes), 200)
    predicted, scores = probs.argmax(1), summarize(target, probs, 1 if classes == 2 else None)
    assert scores["accuracy"] == reference.accuracy_score(target, predicted)
    for average in ("macro", "weighted"):
        assert scores[f"precision_{average}"] == reference.precision_score(target, predicted, average=average)
        assert scores[f"recall_{average}"] == reference.recall_score(target, predicted, average=average)
        assert scores[f"f1_{average}"] == reference.f1_score(target, predicted, average=average)
    assert scores["log_loss"] == pytest.approx(reference.log_loss(target, probs), rel=1e-6)
    assert ("f1_positive" in scores) == (classes == 2)
    if classes == 2:
        assert scores["f1_positive"] == reference.f1_score(target, predicted)
        assert scores["recall_positive"] == (predicted[target == 1] == 1).mean()
        other = summarize(target, probs, 0)
        assert other["recall_positive"] == (predicted[target == 0] == 0).mean()
        assert other["precision_positive"] == (target[predicted == 0] == 0).mean()
        assert scores["auroc"] == pytest.approx(reference.roc_auc_score(target, probs[:, 1]))
        assert other["auroc"] == pytest.approx(scores["auroc"])  # 1 - p of 1 - y
        assert scores["sensitivity"] == other["specificity"] == reference.recall_score(target, predicted)
        assert scores["specificity"] == other["sensitivity"] == ((probs[:, 0] > 0.5)[target == 0]).mean()
    else:
        area = reference.roc_auc_score(target, probs, multi_class="ovr", average="macro")
        assert scores["auroc"] == pytest.approx(area)
        assert "sensitivity" not in scores
    counts = confusion(target, predicted, classes)
    assert counts.sum() == 200
    assert counts[1, 0] == ((target == 1) & (predicted == 0)).sum()


def test_a_class_that_is_never_predicted_or_never_there() -> None:
    scores = summarize(np.array([0, 0, 1]), np.array([[0.9, 0.1, 0], [0.8, 0.2, 0], [0.7, 0.3, 0]]))
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["precision_macro"] == pytest.approx((2 / 3) / 3)
    assert scores["recall_macro"] == pytest.approx(1 / 3)
    assert "auroc" not in scores
    assert auroc(np.array([0, 1, 1, 0]), np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2]])) == 1
    one = summarize(np.array([1, 1]), np.array([[1.0, 0.0], [0.2, 0.8]]), 1)
    assert np.isfinite(one["log_loss"])
    assert one["sensitivity"] == 0.5
    assert not {"auroc", "specificity"} & set(one)
    assert "sensitivity" not in summarize(np.array([1, 1]), np.array([[1.0, 0.0], [0.2, 0.8]]), 0)


@pytest.mark.parametrize("classes", [2, 4])
def test_intervals_are_those_of_resampled_images(classes: int) -> None:
    rng = np.random.default_rng(classes)
    target = rng.integers(0, classes, 70)
    probs = rng.dirichlet(np.ones(classes), 70) + 0.5 * np.eye(classes)[target]
    predicted = probs.argmax(1)
    found = intervals(target, probs)
    assert found == intervals(target, probs)

    def f1(true: np.ndarray, told: np.ndarray) -> float:
        return reference.f1_score(true, told, average="macro", zero_division=0.0)

    for name, statistic in (("accuracy", reference.accuracy_score), ("f1_macro", f1)):
        peer = bootstrap((target, predicted), statistic, paired=True, vectorized=False, n_resamples=1000,
                         method="percentile", rng=np.random.default_rng(5)).confidence_interval  # fmt: skip
        assert found[f"{name}_low"] == pytest.approx(peer.low, abs=0.02)
        assert found[f"{name}_high"] == pytest.approx(peer.high, abs=0.02)
        assert found[f"{name}_low"] < statistic(target, predicted) < found[f"{name}_high"]
        assert found[f"{name}_high"] - found[f"{name}_low"] > 0.1


def test_intervals_of_one_image_and_of_no_error() -> None:
    assert set(intervals(np.array([1]), np.array([[0.0, 1.0]])).values()) == {1.0, 0.5}  # a class is absent: F1 0.5
    sure = intervals(np.array([0, 1] * 20), np.eye(2)[[0, 1] * 20])
    assert set(sure.values()) == {1.0}
    rare = np.array([0] * 20 + [1])  # a third of the resamplings lose the rare class
    assert set(intervals(rare, np.eye(2)[rare]).values()) == {1.0}


def test_rows_and_back() -> None:
    probs = np.array([[0.2, 0.7, 0.1], [0.5, 0.2, 0.3]])
    rows = [
        CaseRow(member="m", case=str(n), part="test", scores=row_scores(n, p, ["a", "b", "c"]))
        for n, p in enumerate(probs)
    ]
    assert rows[0].scores == {"target": 0, "predicted": 1, "correct": 0, "p:a": 0.2, "p:b": 0.7, "p:c": 0.1}
    target, back = arrays(rows)
    assert target.tolist() == [0, 1]
    assert np.array_equal(back, probs)
