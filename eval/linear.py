"""The linear probe: logistic regression on standardized features, its strength chosen on the training side only.

The objective is that of :func:`eosin.eval.logistic.logistic_path`; features are standardized by the mean and deviation
of the side that is learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from eosin.data_tools.draws import hash32, purpose
from eosin.data_tools.errors import UserError
from eosin.eval.logistic import TOLERANCE as TOLERANCE
from eosin.eval.logistic import Fit, logistic_path
from eosin.eval.logistic import Scale as Scale
from eosin.eval.splits import stratified_folds

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
INNER_FOLDS = 3
# A class that a training side lacks gets no probability; the logarithm needs a floor.
FLOOR = 1e-12


def linear_probabilities(
    queries: np.ndarray,
    train: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    n_classes: int,
    seed: int,
    device: torch.device | str = "cpu",
    *,
    rows: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """Fit on the training side, with C chosen there by inner grouped folds, and score the queries.

    Args:
        queries: [Q, D].
        train: [T, D]; or [N, D], possibly mapped from a file, of which ``rows`` are the training side.
        labels: [T], class numbers in [0, n_classes).
        groups: [T].
        rows: [T] int64.

    Returns:
        Probabilities [Q, n_classes], and the C that was chosen.
    """
    rows = np.arange(len(train)) if rows is None else rows
    strength = choose_strength(train, labels, groups, n_classes, seed, device, rows=rows)
    (fit,) = _path(train, rows, labels, n_classes, (strength,), device)
    return fit(queries, None), strength


def choose_strength(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    n_classes: int,
    seed: int,
    device: torch.device | str = "cpu",
    *,
    rows: np.ndarray | None = None,
) -> float:
    """The C of :data:`GRID` with the least cross-entropy over inner grouped folds; ties go to the stronger penalty.

    A sample whose class the inner training side lacks is not scored. The walk from strong to weak penalties ends at
    the first that is worse than the one before it, since weak penalties take the most time. ``rows`` are the training
    side, of which labels and groups are, where that is not all of the features.

    Raises UserError when the training side has a single group.
    """
    n_groups = len(np.unique(groups))
    if n_groups < 2:
        raise UserError(
            "the training side of a fold has 1 group, too few to choose C by grouped folds inside it; "
            "label samples of more groups"
        )
    inner = stratified_folds(labels, groups, min(INNER_FOLDS, n_groups), hash32(seed, purpose("inner folds")))
    rows = np.arange(len(features)) if rows is None else rows
    paths, scored = [], []
    for fold in range(int(inner.max()) + 1):
        learn = inner != fold
        score = ~learn & np.isin(labels, labels[learn])
        if score.any() and len(np.unique(labels[learn])) > 1:
            paths.append(_path(features, rows[learn], labels[learn], n_classes, GRID, device))
            scored.append((rows[score], labels[score]))
    losses: list[float] = []
    for fits in zip(*paths):
        losses.append(sum(_cross_entropy(fit(features, some), y) for fit, (some, y) in zip(fits, scored)))
        if len(losses) > 1 and losses[-1] > losses[-2]:
            break
    return GRID[int(np.argmin(losses))] if losses else GRID[len(GRID) // 2]


def _path(
    features: np.ndarray,
    rows: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    strengths: Sequence[float],
    device: torch.device | str,
) -> Iterator[Callable[[np.ndarray, np.ndarray | None], np.ndarray]]:
    """At each strength in turn, a function from features [N, D] and some of their rows, or None for all, to
    probabilities [Q, n_classes], zero for classes not in ``labels``.

    Learns from some rows of the features, whose labels are given. Nothing of the features is copied but those rows.
    """
    present, codes = np.unique(labels, return_inverse=True)

    def of_all(fit: Fit, queries: np.ndarray, some: np.ndarray | None) -> np.ndarray:
        probabilities = np.zeros((len(queries) if some is None else len(some), n_classes))
        probabilities[:, present] = fit.probabilities(queries, some)
        return probabilities

    scale = Scale.of(features, rows)
    for fit in logistic_path(features, codes, strengths, rows=rows, scale=scale, device=device):
        yield partial(of_all, fit)


def _cross_entropy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Summed over samples."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], FLOOR)).sum())
