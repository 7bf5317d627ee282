"""Metrics with intervals: a value, its 95 % interval, and paired differences between probes.

Intervals come from the cluster bootstrap: whole groups (patients, slides) are drawn with replacement, since tiles of
one slide are not independent samples. All draws are computed at once from per-group counts. An interval holds for the
probes as they were fitted: it covers the choice of groups that were scored, not the fitting of new probes. A value
below chance is reported as it is, never mirrored.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from eosin.data_tools.draws import generator, purpose

METRICS = ("balanced_accuracy", "macro_f1", "accuracy", "auroc")
DRAWS = 1000
LEVEL = 0.95
CHUNK = 1 << 22


def bootstrap_weights(n_groups: int, draws: int, seed: int) -> np.ndarray:
    """How often each group is drawn: [1 + draws, n_groups]. Row 0 is all ones, which gives the value itself."""
    uniform = np.full(n_groups, 1.0 / n_groups)
    counts = generator(seed, purpose("cluster bootstrap")).multinomial(n_groups, uniform, size=draws)
    return np.concatenate([np.ones((1, n_groups)), counts])


def evaluate(labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Compute every metric of :data:`METRICS` under every row of ``weights``.

    The prediction is the most probable class, the first of several equal ones. Balanced accuracy is the mean of the
    recalls, macro-F1 the mean of the F1 scores, AUROC the mean over classes of the area of one class against the
    rest, ties counted half; each mean leaves out the classes for which it is undefined in that draw.

    Args:
        labels: [N], class numbers in [0, C).
        probabilities: [N, C].
        groups: [N], group numbers in [0, G).
        weights: [R, G], how often each group counts.

    Returns:
        metric -> [R]. Plain weights of ones give what scikit-learn gives.
    """
    n_classes, n_groups = probabilities.shape[1], weights.shape[1]
    predicted = probabilities.argmax(axis=1)
    hit = predicted == labels

    def count(classes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        cells = np.bincount(rows * n_classes + classes, minlength=n_groups * n_classes)
        return weights @ cells.reshape(n_groups, n_classes)  # [R, C]

    true, guessed, both = count(labels, groups), count(predicted, groups), count(labels[hit], groups[hit])
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "balanced_accuracy": np.nanmean(both / true, axis=1),
            "macro_f1": np.nanmean(2 * both / (true + guessed), axis=1),
            "accuracy": both.sum(axis=1) / true.sum(axis=1),
            "auroc": _mean_defined(
                [auroc(labels == c, probabilities[:, c], groups, weights) for c in range(n_classes)]
            ),
        }


def auroc(positive: np.ndarray, scores: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve under every row of ``weights``: [R]; NaN where a draw lacks one of the two sides.

    Args:
        positive: [N], bool.
        scores: [N], higher means more probably positive; ties count half.
        groups: [N], group numbers.
        weights: [R, G].
    """
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])  # of each run of equal scores
    positive, groups = positive[order], groups[order]
    areas = np.empty(len(weights))
    step = max(1, CHUNK // len(scores))
    for first in range(0, len(weights), step):
        sample = weights[first : first + step][:, groups]  # [r, N]
        up = np.add.reduceat(sample * positive, starts, axis=1)  # [r, runs]
        down = np.add.reduceat(sample * ~positive, starts, axis=1)
        below = np.cumsum(down, axis=1) - down
        with np.errstate(invalid="ignore", divide="ignore"):
            won = (up * (below + 0.5 * down)).sum(axis=1)
            areas[first : first + step] = won / (up.sum(axis=1) * down.sum(axis=1))
    return areas


def interval(values: np.ndarray) -> dict[str, float]:
    """Value and percentile interval of [1 + draws] values, the first of which is the value itself."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(values[1:], [tail, 100 - tail])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Paired difference ``a - b`` of two probes' values under the same draws, and whether it excludes zero."""
    found = interval(a - b)
    return found | {"excludes_zero": bool(found["low"] > 0 or found["high"] < 0)}


def chance(labels: np.ndarray, n_classes: int) -> dict[str, float]:
    """What a probe that never looks at its features is expected to reach.

    Balanced accuracy and AUROC: 1/C and .5, whatever it guesses. Accuracy: the share of the largest class, by always
    guessing it. Macro-F1: 1/C, by guessing each class at its share.
    """
    largest = float(np.bincount(labels, minlength=n_classes).max() / len(labels))
    return {"balanced_accuracy": 1 / n_classes, "macro_f1": 1 / n_classes, "accuracy": largest, "auroc": 0.5}


def _mean_defined(rows: list[np.ndarray]) -> np.ndarray:
    stacked = np.stack(rows)  # [C, R]
    defined = np.isfinite(stacked)
    with np.errstate(invalid="ignore"):
        return np.where(defined, stacked, 0.0).sum(axis=0) / defined.sum(axis=0)
