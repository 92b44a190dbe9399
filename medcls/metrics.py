"""Scores of a classification, by scikit-learn.

N images, K classes.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import (
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
    recall_score,
    roc_auc_score,
)

from medtrain.results import CaseRow

PROBABILITY = "p:"
RESAMPLES, SEED = 1000, 0


def row_scores(target: int, probs_K: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """What a row tells of an image: class and prediction as numbers, whether they agree, every probability."""
    predicted = int(probs_K.argmax())
    probabilities = {f"{PROBABILITY}{name}": float(p) for name, p in zip(classes, probs_K, strict=True)}
    return {"target": target, "predicted": predicted, "correct": int(predicted == target), **probabilities}


def arrays(rows: Sequence[CaseRow]) -> tuple[np.ndarray, np.ndarray]:
    """(target (N,) int64, probabilities (N,K) float64) of rows that `row_scores` made."""
    names = [name for name in rows[0].scores if name.startswith(PROBABILITY)]
    target = np.array([round(row.scores["target"]) for row in rows], np.int64)
    return target, np.array([[row.scores[name] for name in names] for row in rows])


def summarize(target_N: np.ndarray, probs_NK: np.ndarray, positive: int | None = None) -> dict[str, float]:
    """Accuracy; precision, recall and F1 as macro and weighted means over classes; log-loss; `auroc`. With a `positive`
    class of two also its precision, recall and F1, and sensitivity and specificity at a probability of 0.5.

    A class without predictions has precision 0. What the images do not define is left out: sensitivity without positive
    ones, specificity without others, `auroc` where a class is absent.
    """
    count = probs_NK.shape[1]
    predicted = probs_NK.argmax(1)
    scores = {"accuracy": float((predicted == target_N).mean())}
    averages = ["macro", "weighted"] + ([] if positive is None else ["positive"])
    for average in averages:
        chosen = {"average": "binary", "pos_label": positive} if average == "positive" else {"average": average}
        labels = None if average == "positive" else list(range(count))
        values = precision_recall_fscore_support(target_N, predicted, labels=labels, zero_division=0.0, **chosen)
        for name, value in zip(("precision", "recall", "f1"), values, strict=False):
            scores[f"{name}_{average}"] = float(value)
    safe = np.clip(probs_NK, 1e-7, None)
    safe = safe / safe.sum(1, keepdims=True)
    scores["log_loss"] = float(log_loss(target_N, safe, labels=list(range(count))))
    area = auroc(target_N, probs_NK, positive)
    if area is not None:
        scores["auroc"] = area
    if positive is not None:
        for name, label in (("sensitivity", positive), ("specificity", 1 - positive)):
            if (target_N == label).any():
                scores[name] = float(recall_score(target_N == label, predicted == label))
    return scores


def auroc(target_N: np.ndarray, probs_NK: np.ndarray, positive: int | None = None) -> float | None:
    """Area under the ROC curve of the positive class, or the mean over classes of each against all others; None where
    such a class, or all others, have no image.
    """
    areas = []
    for label in range(probs_NK.shape[1]) if positive is None else (positive,):
        own_N = target_N == label
        if own_N.all() or not own_N.any():
            return None
        areas.append(float(roc_auc_score(own_N, probs_NK[:, label])))
    return sum(areas) / len(areas)


def intervals(target_N: np.ndarray, probs_NK: np.ndarray) -> dict[str, float]:
    """95 % bootstrap intervals over images of accuracy and macro F1, as `<score>_low` and `<score>_high` (Efron and
    Tibshirani 1993, percentiles of 1000 resamplings, the same for the same images).

    Both are functions of the confusion matrix, and that of N images drawn with replacement is multinomial: its cells
    are drawn, which is the same and takes no longer for many images. A class that a resampling lost is left out of its
    mean F1.
    """
    count = probs_NK.shape[1]
    cells = confusion(target_N, probs_NK.argmax(1), count).ravel()
    drawn = np.random.default_rng(SEED).multinomial(cells.sum(), cells / cells.sum(), RESAMPLES)
    drawn_RKK = drawn.reshape(RESAMPLES, count, count)
    right_RK = np.diagonal(drawn_RKK, axis1=1, axis2=2)
    either_RK = drawn_RKK.sum(1) + drawn_RKK.sum(2)  # true or predicted
    f1_RK = 2 * right_RK / np.maximum(1, either_RK)
    # 0 where it is not among all images either, as in `summarize`
    counted_RK = (either_RK > 0) | ~either_RK.any(0)
    f1_R = f1_RK.sum(1) / counted_RK.sum(1)
    found = {}
    for name, values in (("accuracy", right_RK.sum(1) / cells.sum()), ("f1_macro", f1_R)):
        found[f"{name}_low"], found[f"{name}_high"] = map(float, np.percentile(values, (2.5, 97.5)))
    return found


def confusion(target_N: np.ndarray, predicted_N: np.ndarray, classes: int) -> np.ndarray:
    """(K,K) counts, true class down, predicted class across."""
    return confusion_matrix(target_N, predicted_N, labels=list(range(classes)))
