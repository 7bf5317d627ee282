"""Whether probabilities mean what they say: the expected calibration error and the table behind it.

The confidence of an answer is the probability of the class that it names. Answers are binned by confidence in bins of
equal width, each open at its lower end (Guo et al., "On calibration of modern neural networks", 2017, eq. 3).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from eosin.eval.metrics import sums
from eosin.eval.statistics import interval

BINS = 15


def reliability(
    labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray, weights: np.ndarray, bins: int = BINS
) -> dict[str, Any]:
    """Expected calibration error and the reliability table.

    The error stands without an interval: it is biased upward in small samples, and more so in those that a bootstrap
    draws. The accuracy of each bin has one.

    Args:
        labels: [N], class numbers in [0, C).
        probabilities: [N, C].
        groups: [N], group numbers.
        weights: [1 + draws, G], as :func:`~eosin.eval.statistics.bootstrap_weights` gives them.

    Returns:
        ``ece``, the mean over answers of |accuracy - confidence| of their bin, and ``bins``, one dictionary for each
        bin that holds answers: from, to, n, confidence, accuracy (value, low, high).
    """
    guessed = probabilities.argmax(axis=1)
    confidence = np.asarray(probabilities[np.arange(len(labels)), guessed], dtype=np.float64)
    right = (guessed == labels).astype(np.float64)
    bin_of = np.clip(np.searchsorted(np.arange(bins + 1) / bins, confidence, side="left") - 1, 0, bins - 1)
    table, error = [], 0.0
    for number in np.unique(bin_of).tolist():
        inside = bin_of == number
        n, correct = sums(np.stack([np.ones(inside.sum()), right[inside]], axis=1), groups[inside], weights).T  # [R]
        with np.errstate(invalid="ignore", divide="ignore"):
            accuracy = interval(correct / n)
        said = float(confidence[inside].mean())
        error += float(inside.mean()) * abs(accuracy["value"] - said)
        table.append(
            {
                "from": number / bins,
                "to": (number + 1) / bins,
                "n": int(inside.sum()),
                "confidence": said,
                "accuracy": accuracy,
            }
        )
    return {"ece": error, "bins": table}
