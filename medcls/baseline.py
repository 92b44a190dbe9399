"""A trivial classifier that sees no shapes: logistic regression on colour histograms."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

NAME = "baseline (colour histogram)"


def histogram_probs(train_NF: np.ndarray, target_N: np.ndarray, test_MF: np.ndarray, classes: int) -> np.ndarray:
    """Class probabilities (M,K) float64 of test histograms, after fitting to the training ones; deterministic."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    model.fit(train_NF, target_N)
    probs = np.zeros((len(test_MF), classes))
    probs[:, model.classes_] = model.predict_proba(test_MF)
    return probs
