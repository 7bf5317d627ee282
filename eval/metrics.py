"""Metrics of classification, regression and overlap, each under many draws of groups at once.

Every function takes samples with their group and the weights of groups, one row a draw, and gives one value a draw.
Counts are summed by group first, so that a draw costs a product with its weights and never another look at the
samples. Areas under the ROC curve count pairs, ties half. What a draw leaves undefined is NaN, never a guess, and a
value below chance is never mirrored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

METRICS = ("balanced_accuracy", "macro_f1", "accuracy", "auroc")
# Of more than two classes, and of classes that are ordered.
ONE_VS_ONE, KAPPA = "auroc_ovo", "quadratic_kappa"
PER_CLASS = ("recall", "precision", "f1", "auroc")
CHUNK = 1 << 22  # numbers held at a time


@dataclass(frozen=True)
class Tally:
    """What the metrics of a probe are made from, under each of R draws.

    Attributes:
        true: [R, C], samples of each class.
        guessed: [R, C], samples taken for each class: the most probable one, the first of several equal ones.
        both: [R, C], samples of each class that were taken for it.
        won: [R, C, C], pairs of a sample of class a and one of class b that the probability of a ranks right.
        moments: [R, 5], sums of the class number, of the guessed one, of their squares, and of their difference's.
    """

    true: np.ndarray
    guessed: np.ndarray
    both: np.ndarray
    won: np.ndarray
    moments: np.ndarray


def tally(labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> Tally:
    """Count once what all metrics of a probe need.

    Args:
        labels: [N], class numbers in [0, C).
        probabilities: [N, C].
        groups: [N], group numbers in [0, G).
        weights: [R, G], how often each group counts.
    """
    n_classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    hit = predicted == labels

    def count(classes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        cells = np.bincount(rows * n_classes + classes, minlength=weights.shape[1] * n_classes)
        return weights @ cells.reshape(-1, n_classes)  # [R, C]

    numbers = np.stack([labels, predicted, labels**2, predicted**2, (labels - predicted) ** 2], axis=1)
    won = [pairs_won(labels, probabilities[:, c], c, groups, weights, n_classes) for c in range(n_classes)]
    return Tally(
        count(labels, groups),
        count(predicted, groups),
        count(labels[hit], groups[hit]),
        np.stack(won, axis=1),
        sums(numbers, groups, weights),
    )


def overall(counts: Tally, metrics: Sequence[str] = METRICS) -> dict[str, np.ndarray]:
    """Metrics over all classes: metric -> [R].

    Balanced accuracy is the mean of the recalls, macro-F1 the mean of the F1 scores, AUROC the mean over classes of the
    area of one class against the rest, ``auroc_ovo`` the mean over pairs of classes of the areas of one against the
    other (Hand and Till 2001, eq. 7), ``quadratic_kappa`` Cohen's kappa with weights of the squared distance between
    class numbers (Cohen 1968). Each mean leaves out the classes for which it is undefined in that draw.
    """
    classes = per_class(counts)
    found = {"balanced_accuracy": mean_defined(classes["recall"])}
    found["macro_f1"] = mean_defined(classes["f1"])
    found["accuracy"] = _ratio(counts.both.sum(axis=1), counts.true.sum(axis=1))
    found["auroc"] = mean_defined(classes["auroc"])
    if ONE_VS_ONE in metrics:
        areas = _ratio(counts.won, counts.true[:, :, None] * counts.true[:, None, :])  # [R, C, C]
        apart = ~np.eye(counts.true.shape[1], dtype=bool)
        found[ONE_VS_ONE] = mean_defined(areas[:, apart])
    if KAPPA in metrics:
        y, p, yy, pp, apart2 = counts.moments.T
        found[KAPPA] = 1 - _ratio(apart2, yy + pp - 2 * _ratio(y * p, counts.true.sum(axis=1)))
    return {metric: found[metric] for metric in metrics}


def per_class(counts: Tally) -> dict[str, np.ndarray]:
    """Recall, precision, F1 (which is Dice) and AUROC against the rest, of each class: metric -> [R, C]."""
    true, guessed, both = counts.true, counts.guessed, counts.both
    others = true.sum(axis=1, keepdims=True) - true
    return {
        "recall": _ratio(both, true),
        "precision": _ratio(both, guessed),
        "f1": _ratio(2 * both, true + guessed),
        "auroc": _ratio(counts.won.sum(axis=2), true * others),
    }


def evaluate(
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: np.ndarray,
    weights: np.ndarray,
    metrics: Sequence[str] = METRICS,
) -> dict[str, np.ndarray]:
    """:func:`overall` of a :func:`tally`: metric -> [R]. Plain weights of ones give what scikit-learn gives."""
    return overall(tally(labels, probabilities, groups, weights), metrics)


def auroc(positive: np.ndarray, scores: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve under every row of ``weights``: [R]; NaN where a draw lacks one of the two sides.

    Args:
        positive: [N], bool.
        scores: [N], higher means more probably positive; ties count half.
        groups: [N], group numbers.
        weights: [R, G].
    """
    won = pairs_won(positive.astype(np.int64), scores, 1, groups, weights, 2)[:, 0]
    up, down = sums(np.stack([positive, ~positive], axis=1), groups, weights).T
    return _ratio(won, up * down)


def pairs_won(
    labels: np.ndarray, scores: np.ndarray, which: int, groups: np.ndarray, weights: np.ndarray, n_classes: int
) -> np.ndarray:
    """How many pairs of a sample of class ``which`` and one of class b have the first above: [R, C], ties half.

    Pairs are counted between groups once and weighted by draw, where there are fewer groups than draws; otherwise
    they are counted in each draw. Both are exact.
    """
    from scipy.sparse import csr_matrix

    won = np.zeros((len(weights), n_classes))
    ours, others = np.flatnonzero(labels == which), np.flatnonzero(labels != which)
    if not len(ours) or not len(others):
        return won
    ours = ours[np.argsort(scores[ours], kind="stable")]
    others = others[np.argsort(labels[others], kind="stable")]
    present, starts = np.unique(labels[others], return_index=True)
    low = np.searchsorted(scores[ours], scores[others], side="left")
    high = np.searchsorted(scores[ours], scores[others], side="right")
    step = max(1, CHUNK // len(labels))
    up_groups, up = np.unique(groups[ours], return_inverse=True)
    cells, down = np.unique(labels[others] * weights.shape[1] + groups[others], return_inverse=True)
    if len(up_groups) <= len(weights) and len(up_groups) * len(cells) <= CHUNK:
        by_cell = csr_matrix((np.ones(len(down)), (down, np.arange(len(down)))))  # [cells, others]
        matrix = np.empty((len(cells), len(up_groups)))
        for first in range(0, len(up_groups), step):
            columns = np.arange(first, min(first + step, len(up_groups)))
            matrix[:, columns] = by_cell @ _above((up[:, None] == columns).astype(np.float64), low, high)
        of_class, of_group = np.divmod(cells, weights.shape[1])
        for c in present:
            rows = of_class == c
            won[:, c] = (weights[:, of_group[rows]] @ matrix[rows] * weights[:, up_groups]).sum(axis=1)
        return won
    for first in range(0, len(weights), step):
        drawn = np.ascontiguousarray(weights[first : first + step].T)  # [G, r]
        pairs = drawn[groups[others]] * _above(drawn[groups[ours]], low, high)  # [others, r]
        won[first : first + step, present] = np.add.reduceat(pairs, starts, axis=0).T
    return won


def pearson(truth: np.ndarray, predicted: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson's correlation of two columns [N] under every draw: [R]; NaN where one of them is constant."""
    x, y = truth - np.mean(truth), predicted - np.mean(predicted)
    n, sx, sy, sxx, syy, sxy = sums(np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], axis=1), groups, weights).T
    with np.errstate(invalid="ignore"):
        spread = np.sqrt(n * sxx - sx**2) * np.sqrt(n * syy - sy**2)
    return _ratio(n * sxy - sx * sy, spread)


def dice(overlap: np.ndarray, truth: np.ndarray, predicted: np.ndarray, groups: np.ndarray, weights: np.ndarray):
    """Dice over all pixels of a draw, ``2 |A and B| / (|A| + |B|)``: [R, ...]; NaN where neither holds any.

    Args:
        overlap: [N, ...], pixels of each image (and class) that are in both masks.
        truth: [N, ...], pixels in the true mask.
        predicted: [N, ...], pixels in the predicted mask.
        groups: [N], the images' group numbers.
        weights: [R, G].
    """
    shape = (len(weights), *overlap.shape[1:])
    both, a, b = (sums(m.reshape(len(m), -1), groups, weights).reshape(shape) for m in (overlap, truth, predicted))
    return _ratio(2 * both, a + b)


def sums(values: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums of the columns of [N, K] under every draw: [R, K]."""
    by_group = [np.bincount(groups, column, minlength=weights.shape[1]) for column in values.T]
    return weights @ np.stack(by_group, axis=1)


def mean_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN: [R, K] -> [R]; NaN where nothing is left."""
    defined = np.isfinite(values)
    return _ratio(np.where(defined, values, 0.0).sum(axis=-1), defined.sum(axis=-1))


def chance(labels: np.ndarray, n_classes: int) -> dict[str, float]:
    """What a probe that never looks at its features is expected to reach.

    Balanced accuracy and both AUROCs: 1/C and .5, whatever it guesses. Accuracy: the share of the largest class, by
    always guessing it. Macro-F1: 1/C, by guessing each class at its share. Kappa: 0.
    """
    largest = float(np.bincount(labels, minlength=n_classes).max() / len(labels))
    return {
        "balanced_accuracy": 1 / n_classes,
        "macro_f1": 1 / n_classes,
        "accuracy": largest,
        "auroc": 0.5,
        ONE_VS_ONE: 0.5,
        KAPPA: 0.0,
    }


def _above(counts: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Of sorted samples with counts [P, r], how many lie above each other sample, [Q, r]; ties count half.

    ``low`` and ``high`` [Q] say how many samples lie below each other one, without and with its equals.
    """
    below = np.zeros((len(counts) + 1, counts.shape[1]))
    np.cumsum(counts, axis=0, out=below[1:])
    return below[-1] - 0.5 * (below[low] + below[high])


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)
